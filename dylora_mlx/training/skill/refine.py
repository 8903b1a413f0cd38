"""Refine the expert of a known skill, with replay of its earlier skills, and undo the refinement if it does harm."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dylora_mlx.config import Config
from dylora_mlx.data.stream import Skill, Split
from dylora_mlx.growth.library import Library
from dylora_mlx.system import console
from dylora_mlx.system.seeds import SeedStream, generator
from dylora_mlx.training.checkpoint.state import TrainerState
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill.base_pass import run_base_pass
from dylora_mlx.training.skill.learn import learn_skill
from dylora_mlx.training.skill.replay import copy_gate
from dylora_mlx.training.skill.snapshot import restore_snapshot, take_snapshot


@dataclass(frozen=True)
class RefinementVerdict:
    """Verdict on a refinement. Losses are in nats a token."""

    kept: bool
    """Whether the refinement is kept."""
    worst_domain: str
    """The guarded domain whose loss rose most."""
    worst_rise: float
    """Rise of that domain's loss."""
    gain: float
    """Fall of the skill's own loss."""
    mean_rise: float
    """Mean rise of the loss over all skills so far."""
    reason: str
    """Explanation for the console and decisions.jsonl."""
    risen: dict[str, float] = field(default_factory=dict)
    """Rise of every learned skill whose loss rose by more than growth.epsilon. Skills of other experts may, if the skills so
    far improve in the mean."""


def refine_expert(run: TrainingRun, skill: Skill, expert_id: int) -> RefinementVerdict:
    """Train an expert on one more skill, together with documents of its earlier skills.

    The refinement is kept only if no guarded domain's loss rises by more than growth.epsilon nats, the skill improves,
    and all skills so far improve in the mean. Guarded are the expert's earlier skills and the domains outside the
    stream (what the base knew). Skills that are still to come are not considered. Otherwise the refinement is rolled
    back exactly.

    A run stopped meanwhile resumes from before the refinement, because a checkpoint taken within could not be rolled
    back. Returns the verdict.
    """
    earlier_skills = skills_of_expert(run.library, expert_id)
    mixed = mix_replay(
        run.config, skill, [earlier for earlier in run.skills if earlier.name in earlier_skills], run.state.skill_index
    )
    with run.timers.time("reading"):
        base_pass = run_base_pass(run.model, mixed, run.config, run.features_folder / f"{skill.name}-replay.npy")
    before, snapshot = run.evaluate(), take_snapshot(run)
    # The teacher for distillation is the mixture before the refinement.
    run.state.teacher_gate = copy_gate(run.model)
    run.pool.unfreeze(expert_id)
    run.optimizers.init(run.model)
    with run.timers.time("steps"):
        learn_skill(run, mixed, base_pass, expert_id)
    after = run.evaluate()
    run.pool.freeze(expert_id)
    run.optimizers.drop_moments(expert_id)
    rise = {name: after[name].loss - evaluation.loss for name, evaluation in before.items()}
    if base_pass.features is not None:
        base_pass.features.delete()
    verdict = judge_refinement(run.config, run.state, run.skills, rise, earlier_skills, skill.name)
    if not verdict.kept:
        restore_snapshot(run, snapshot)
        console.info(f"  rolled back: {verdict.reason}; expert {expert_id} is as it was")
        return verdict
    console.detail(f"  refined expert {expert_id}: {verdict.reason}")
    return verdict


def judge_refinement(
    config: Config,
    state: TrainerState,
    skills: list[Skill],
    rise: Mapping[str, float],
    earlier: Collection[str],
    name: str,
) -> RefinementVerdict:
    """Judge whether a refinement is kept; see `refine_expert` for the rule.

    Args:
        config: the run's configuration.
        state: the state of the run. Skills up to `state.skill_index` count as learned.
        skills: the stream.
        rise: rise of each domain's loss, in nats.
        earlier: names of the expert's skills before the refinement.
        name: name of the refined skill.
    """
    epsilon = config.growth.epsilon
    learned = {skill.name for skill in skills[: state.skill_index + 1]}
    upcoming = {skill.name for skill in skills} - learned
    guarded = [domain for domain in rise if domain in earlier or domain not in learned | upcoming]
    worst_domain = max(guarded, key=lambda domain: rise[domain])
    evaluated = [domain for domain in rise if domain in learned]
    gain, mean_rise = -rise[name], sum(rise[domain] for domain in evaluated) / len(evaluated)
    if rise[worst_domain] > epsilon:
        accepted, reason = False, f"{worst_domain} lost {rise[worst_domain]:.3f} nats ({epsilon:.3f} allowed)"
    elif gain <= 0:
        accepted, reason = False, "it did not improve"
    elif mean_rise >= 0:
        accepted, reason = False, f"the skills so far lost {mean_rise:.3f} nats together"
    else:
        accepted, reason = (
            True,
            f"{gain:+.3f} nats gained, {-mean_rise:+.3f} in the mean of the skills so far; "
            f"{worst_domain} {rise[worst_domain]:+.3f}",
        )
    risen = {domain: value for domain, value in rise.items() if value > epsilon and domain not in upcoming}
    if accepted and risen:
        reason += f"; above growth.epsilon: {', '.join(f'{domain} {value:+.3f}' for domain, value in risen.items())}"
    return RefinementVerdict(accepted, worst_domain, rise[worst_domain], gain, mean_rise, reason, risen)


def skills_of_expert(library: Library, expert_id: int) -> set[str]:
    """Return the names of the skills that an expert is assigned to."""
    return {entry.skill for entry in library.entries if entry.expert == expert_id}


def mix_replay(config: Config, skill: Skill, earlier: Sequence[Skill], number: int) -> Skill:
    """Return a copy of a skill whose training split also contains segments of earlier skills for replay.

    They make up growth.replay_fraction of all segments, or less if there are too few. `number` is the skill's index in
    the stream, which seeds the draw.
    """
    earlier_segments = [segment for other in earlier for segment in other.train.segments]
    fraction = config.growth.replay_fraction
    rng = generator(config.seed, SeedStream.REFINE_REPLAY, number)
    count = min(len(earlier_segments), round(len(skill.train.segments) * fraction / (1 - fraction)))
    # Number the replayed documents after the skill's own, so that the two are never taken for one document.
    first = 1 + max(segment.document for segment in skill.train.segments)
    chosen = [earlier_segments[i] for i in np.sort(rng.permutation(len(earlier_segments))[:count])]
    replayed = [segment._replace(document=first + number) for number, segment in enumerate(chosen)]
    mixed = Split([*skill.train.segments, *replayed], skill.train.num_documents + len(replayed))
    return replace(skill, train=mixed)
