"""Create an expert for a new skill: add it, train it, and keep it only if a measurement says that it helps and does no harm.

The mixture with the new expert is compared with the one before on the same held-out documents. If the skill gains but other
domains lose too much, the router is fitted again, without what training changed in it, and the comparison is repeated. An expert
that is not kept is undone exactly, and tried once more at smaller learning rates where that can help.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace

import mlx.core as mx
import numpy as np

from dylora_mlx.config import GrowthConfig
from dylora_mlx.data.stream import Skill
from dylora_mlx.distributed.group import world
from dylora_mlx.growth.decide.policy import Decision
from dylora_mlx.growth.novelty.embedding import bootstrap_sums
from dylora_mlx.growth.pool import ExpertRecord
from dylora_mlx.model.routing.router import Gate
from dylora_mlx.system import console
from dylora_mlx.system.seeds import SeedStream, derived_seed, generator
from dylora_mlx.training.checkpoint.state import BestState
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill import fit_router, split_skill
from dylora_mlx.training.skill.base_pass import BasePass
from dylora_mlx.training.skill.fit_router import RouterFit
from dylora_mlx.training.skill.learn import learn_skill
from dylora_mlx.training.skill.replay import copy_gate
from dylora_mlx.training.skill.router_tokens import SkillFeatures
from dylora_mlx.training.step.evaluate import Evaluation

ALLOWED_SHARE = 0.1
"""Part of its skill's gain that a new expert may cost another domain, where that is more than growth.epsilon."""
CANDIDATES = 8
"""Existing experts, nearest first, that are measured for a skill whose own expert was undone."""


@dataclass(frozen=True)
class CreationVerdict:
    """Verdict on a new expert. Losses are in nats a token, on held-out documents."""

    kept: bool
    gain: float
    """Fall of the skill's loss against the mixture before."""
    interval: tuple[float, float]
    """Bootstrap interval of the gain, over documents."""
    worst_domain: str | None
    """The guarded domain whose loss rose most; None if there is none."""
    worst_rise: float
    """Rise of that domain's loss."""
    attempts: int
    """Trainings: 2 if the first was repeated at a tenth of the learning rates."""
    reason: str
    """Explanation for the console and decisions.jsonl."""
    risen: dict[str, float] = field(default_factory=dict)
    """Rise of every guarded domain whose loss rose by more than growth.epsilon."""

    @property
    def harmful(self) -> bool:
        """Whether the expert is refused although its skill surely gains: other domains lose too much."""
        return not self.kept and self.interval[0] > 0


def add_expert(run: TrainingRun, skill: Skill, base_pass: BasePass, decision: Decision) -> None:
    """Add an expert and its gate row, fit the router to the remembered features of all skills, and extend the optimizers."""
    config, growth = run.config, run.config.growth
    rank, alpha = run.expert_rank(skill)
    # From before the new row exists: an expert that is not kept is undone to it, and distillation stays near it.
    run.state.teacher_gate = copy_gate(run.model)
    nearest: list[int] = []
    if growth.expert_init == "mean":  # as many as a token is routed to in the dense phase
        nearest = run.library.nearest_experts(decision.similarities, growth.dense_experts)
    key = mx.random.key(derived_seed(config.seed, SeedStream.EXPERT_INIT, len(run.pool)))
    run.pool.add(ExpertRecord(skill.name, rank, alpha, run.state.step), key, nearest)
    fitted = _fit_router(run, skill, base_pass)
    console.detail(
        f"  router fitted to {len(run.library.entries) + 1} skills: cross-entropy {fitted.cross_entropy:.3f}, "
        f"{fitted.accuracy:.0%} right, on held-out documents"
    )
    run.optimizers.init(run.model)


def _fit_router(run: TrainingRun, skill: Skill, base_pass: BasePass) -> RouterFit:
    """Fit the router to what is remembered of all skills, and to the newest expert's skill."""
    features = SkillFeatures(base_pass.statistics, base_pass.memory, len(run.pool))
    newcomer = features, split_skill.skill_exemplars(run.config, skill)
    with run.timers.time("router"):
        return fit_router.fit_to_library(run.model, run.library, run.config, newcomer)


def train_expert(
    run: TrainingRun, skill: Skill, base_pass: BasePass, decision: Decision, save: Callable[[TrainingRun], None]
) -> CreationVerdict:
    """Train the expert that `add_expert` added, and freeze it or undo it.

    Args:
        run: the run. A resumed run goes on at its step and attempt.
        skill: the skill to learn.
        base_pass: the base pass over the skill.
        decision: the decision that created the expert.
        save: writes a checkpoint.
    """
    while True:
        with run.timers.time("steps"):
            learn_skill(run, skill, base_pass, decision.expert, save)
        verdict = judge(run, skill, base_pass, decision.expert)
        if verdict.kept:
            run.pool.freeze(decision.expert)
            run.optimizers.drop_moments(decision.expert)
            run.state.last_creation = run.pool.records[decision.expert - 1].created_at
            return verdict
        # A gain that is only uncertain would not grow at smaller rates. `not >`: a loss that is not finite rose, too.
        retries = run.state.attempt == 0 and (not verdict.gain > 0 or verdict.interval[0] > 0)
        console.info(f"  {'tried again at a tenth of the learning rates' if retries else 'undone'}: {verdict.reason}")
        _remove(run, decision.expert)
        run.reset_optimizers()
        if not retries:
            return verdict
        run.state.attempt, run.state.skill_step, run.state.best = 1, 0, BestState()
        add_expert(run, skill, base_pass, decision)


def judge(run: TrainingRun, skill: Skill, base_pass: BasePass, expert_id: int) -> CreationVerdict:
    """Compare the mixture with and without the newest expert on all held-out documents.

    If the skill gains but other domains lose too much, the router's rows are fitted again and compared, too. They are kept
    if the expert is then accepted.
    """
    state, judged = run.state, run.config.growth.acceptance == "measured"
    if not judged or not state.teacher_gate:
        after = run.evaluate()
        gain = state.matrix[-1][skill.name] - after[skill.name].loss
        reason = "begun by a version that judged no expert" if judged else "growth.acceptance is always"
        return CreationVerdict(True, gain, (gain, gain), None, 0.0, 1, reason)
    rows = list(run.model.router.rows)
    expert, record = run.model.experts[expert_id - 1], run.pool.records[expert_id - 1]
    with_expert = [(row.weight, row.bias) for row in rows]
    _remove(run, expert_id)
    # First, while the run still holds the losses after the skill before: only what was watched since is evaluated again.
    before = run.evaluate()
    run.pool.append(expert, record, rows[expert_id])
    for row, (weight, bias) in zip(rows, with_expert, strict=True):
        row.weight, row.bias = weight, bias
    after = run.evaluate()
    upcoming = {other.name for other in run.skills[state.skill_index + 1 :]}
    guarded = [name for name in before if name != skill.name and name not in upcoming]
    seed = derived_seed(run.config.seed, SeedStream.ACCEPTANCE, state.skill_index)
    verdict = compare(before, after, skill.name, guarded, run.config.growth, seed)
    if verdict.harmful:
        # Training's own loss is the new skill's alone, so it can draw the tokens of related skills to the new expert.
        console.info(f"  router fitted again: {verdict.reason}")
        _fit_router(run, skill, base_pass)
        verdict = compare(before, run.evaluate(), skill.name, guarded, run.config.growth, seed)
    verdict = replace(verdict, attempts=state.attempt + 1)
    if verdict.kept and state.attempt == 0 and state.best.step == state.step - state.skill_step:
        # It gains by its start from the other experts alone, so smaller rates are worth a try.
        verdict = replace(verdict, kept=False, reason="training did not improve on its start")
    return CreationVerdict(**world().broadcast_object(asdict(verdict)))


def compare(
    before: Mapping[str, Evaluation],
    after: Mapping[str, Evaluation],
    skill: str,
    guarded: list[str],
    growth: GrowthConfig,
    seed: int,
) -> CreationVerdict:
    """Judge a new expert by losses of the same documents before and after.

    It is kept if its skill surely gains, no guarded domain surely loses more than the larger of growth.epsilon and a tenth of
    that gain, and the skill gains more than the guarded domains lose together. Surely: for the whole bootstrap interval
    over documents, at growth.confidence.

    Args:
        before: evaluations without the expert, by domain.
        after: evaluations with it.
        skill: the domain that should gain.
        guarded: the domains that must not lose.
        growth: confidence, bootstrap resamples and epsilon.
        seed: seed of the bootstrap.
    """
    gain, low, high = loss_change(after[skill], before[skill], growth, seed)
    rises = {name: after[name].loss - before[name].loss for name in guarded}
    worst, allowed = max(rises, key=lambda name: rises[name], default=None), max(growth.epsilon, ALLOWED_SHARE * gain)
    rise, rise_low, rise_high = loss_change(before[worst], after[worst], growth, seed) if worst else (0.0, 0.0, 0.0)
    loss = f"{worst} {'loses' if rise > 0 else 'changes by'} {rise:.3f} nats ({rise_low:.3f} to {rise_high:.3f})"
    gained = f"{gain:+.3f} nats gained ({low:+.3f} to {high:+.3f})"
    kept, reason = True, f"{gained}; {loss}" if worst else gained
    if not low > 0:
        kept, reason = False, f"{skill} does not surely gain: {gained}"
    elif rise_low > allowed:
        kept, reason = False, f"{loss}, {allowed:.3f} allowed"
    elif sum(rises.values()) >= gain:
        kept, reason = (
            False,
            f"the other domains lose {sum(rises.values()):.3f} nats together, {skill} gains {gain:.3f}",
        )
    risen = {name: value for name, value in rises.items() if value > growth.epsilon}
    if kept and risen:
        names = ", ".join(f"{name} {value:+.3f}" for name, value in risen.items())
        reason += f"; above growth.epsilon, but not surely above {allowed:.3f}: {names}"
    return CreationVerdict(kept, gain, (low, high), worst, rise, 1, reason, risen)


def best_existing_expert(run: TrainingRun, skill: Skill, decision: Decision) -> int:
    """Return the expert_id that serves a skill best, of the base and the nearest experts, by its held-out loss."""
    candidates = [0, *run.library.nearest_experts(decision.similarities, CANDIDATES)]
    losses = {expert_id: run.evaluate_expert(skill.name, expert_id).loss for expert_id in candidates}
    return world().broadcast_object(min(losses, key=lambda expert_id: losses[expert_id]))


def loss_change(better: Evaluation, worse: Evaluation, growth: GrowthConfig, seed: int) -> tuple[float, float, float]:
    """Return by how much the loss of `worse` exceeds that of `better`, and the paired bootstrap interval over documents."""
    difference = worse.loss - better.loss
    sums = np.array([[w[0] - b[0], b[1]] for w, b in zip(worse.documents, better.documents, strict=True)]).T
    if not np.isfinite(difference) or sums.shape[-1] < 2:
        return difference, difference, difference
    drawn = bootstrap_sums(sums, growth.bootstrap, generator(seed, SeedStream.INTERVAL))
    tail = (1 - growth.confidence) / 2
    low, high = np.quantile(drawn[0] / drawn[1], [tail, 1 - tail])
    return difference, float(low), float(high)


def _remove(run: TrainingRun, expert_id: int) -> None:
    """Remove the newest expert and restore the gate rows from before it, bit for bit."""
    run.pool.remove([expert_id])
    run.model.router.set_gate(Gate(**run.state.teacher_gate))
