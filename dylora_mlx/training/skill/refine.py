"""Refine the expert of a known skill: more training, with replay of what it already holds, undone if that is harmed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from dylora_mlx.data.stream import Skill, Split
from dylora_mlx.system import console
from dylora_mlx.system.seeds import SeedStream, generator
from dylora_mlx.training.run import Run
from dylora_mlx.training.skill import replay as recall
from dylora_mlx.training.skill import snapshot as rollback
from dylora_mlx.training.skill.base_pass import examine
from dylora_mlx.training.skill.learn import learn
from dylora_mlx.training.step.evaluate import Evaluation


@dataclass(frozen=True)
class Verdict:
    """On a refinement. worst: the guarded domain that lost most, rise: by how many nats; gain: nats that the skill gained;
    mean: nats that the skills so far went up by together."""

    kept: bool
    worst: str
    rise: float
    gain: float
    mean: float
    reason: str


def refine(run: Run, skill: Skill) -> dict[str, Evaluation]:
    """Go on training the matched expert on the skill and on documents of its earlier skills.

    Kept only if neither the expert's earlier skills nor what the base knew lose more than growth.epsilon nats against the
    evaluation before, and all skills so far are better together; else rolled back exactly. Of skills that are still to
    come nothing is asked.
    A run that is stopped meanwhile resumes from before: a checkpoint within would not know what to go back to. Returns
    the evaluation of what is left.
    """
    decision = run.state.decision
    assert decision is not None
    column = decision["expert"]
    names = held(run, column)
    mixed = with_replay(run, skill, [earlier for earlier in run.skills if earlier.name in names], run.state.skill)
    with run.clock.on("reading"):
        studied = examine(run.model, mixed, run.config, run.features / f"{skill.name}-replay.npy")
    before, kept = run.evaluate(), rollback.keep(run)
    run.state.mature = recall.mature_gate(run.model)
    run.pool.thaw(column)
    run.optimizers.init(run.model)
    with run.clock.on("steps"):
        after = learn(run, mixed, studied, column, save=lambda _: None)
    after = after or run.evaluate()
    run.pool.freeze(column)
    rise = {name: after[name].loss - found.loss for name, found in before.items()}
    if studied.features is not None:
        studied.features.delete()
    verdict = judge(run, rise, names, skill.name)
    decision["refined"] = asdict(verdict)
    if not verdict.kept:
        rollback.restore(run, kept)
        console.say(f"  rolled back: {verdict.reason}; expert {column} is as it was")
        return before
    console.say(f"  refined expert {column}: {verdict.reason}")
    return after


def judge(run: Run, rise: Mapping[str, float], earlier: Collection[str], name: str) -> Verdict:
    """Whether a refinement is kept. rise: nats each domain's loss went up by; earlier: the expert's own skills before it;
    name: the skill's."""
    epsilon = run.config.growth.epsilon
    learned = {skill.name for skill in run.skills[: run.state.skill + 1]}
    to_come = {skill.name for skill in run.skills} - learned
    guarded = [domain for domain in rise if domain in earlier or domain not in learned | to_come]
    worst = max(guarded, key=lambda domain: rise[domain])
    gain, mean = -rise[name], sum(rise[domain] for domain in learned) / len(learned)
    if rise[worst] > epsilon:
        kept, reason = False, f"{worst} lost {rise[worst]:.3f} nats ({epsilon:.3f} allowed)"
    elif gain <= 0:
        kept, reason = False, "it did not improve"
    elif mean >= 0:
        kept, reason = False, f"the skills so far lost {mean:.3f} nats together"
    else:
        kept, reason = (
            True,
            f"{gain:+.3f} nats gained, {-mean:+.3f} in the mean of the skills so far; {worst} {rise[worst]:+.3f}",
        )
    return Verdict(kept, worst, rise[worst], gain, mean, reason)


def held(run: Run, column: int) -> set[str]:
    """The skills that an expert was trained on."""
    return {entry.skill for entry in run.library.entries if entry.expert == column}


def with_replay(run: Run, skill: Skill, earlier: Sequence[Skill], number: int) -> Skill:
    """The skill, the stream's `number`th from 0, and documents of the earlier skills that its expert holds, growth.replay
    of all."""
    pieces = [piece for each in earlier for piece in each.train.pieces]
    share = run.config.growth.replay
    rng = generator(run.config.seed, SeedStream.REFINE_REPLAY, number)
    count = min(len(pieces), round(len(skill.train.pieces) * share / (1 - share)))
    # Documents keep apart from the skill's own by their numbers.
    first = 1 + max(piece.document for piece in skill.train.pieces)
    chosen = [pieces[i] for i in np.sort(rng.permutation(len(pieces))[:count])]
    replayed = [piece._replace(document=first + number) for number, piece in enumerate(chosen)]
    together = Split([*skill.train.pieces, *replayed], skill.train.documents + len(replayed))
    return replace(skill, train=together)
