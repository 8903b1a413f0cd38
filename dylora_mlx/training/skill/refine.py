"""Refine the expert of a known skill: more training, with replay of what it already holds, undone if that is harmed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

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
from dylora_mlx.training.step.evaluate import Evaluation


@dataclass(frozen=True)
class RefinementVerdict:
    """On a refinement. worst: the guarded domain that lost most, rise: by how many nats; gain: nats that the skill gained;
    mean: nats that the skills so far went up by together."""

    kept: bool
    worst_domain: str
    worst_rise: float
    gain: float
    mean_rise: float
    reason: str


def refine_expert(run: TrainingRun, skill: Skill, expert_id: int) -> tuple[dict[str, Evaluation], RefinementVerdict]:
    """Go on training an expert on one more skill and on documents of its earlier skills.

    Kept only if neither the expert's earlier skills nor what the base knew lose more than growth.epsilon nats against the
    evaluation before, and all skills so far are better together; else rolled back exactly. Of skills that are still to
    come nothing is asked.
    A run that is stopped meanwhile resumes from before: a checkpoint within would not know what to go back to. Returns
    the evaluation of what is left, and the verdict.
    """
    names = skills_of_expert(run.library, expert_id)
    mixed = mix_replay(
        run.config, skill, [earlier for earlier in run.skills if earlier.name in names], run.state.skill_index
    )
    with run.timers.time("reading"):
        studied = run_base_pass(run.model, mixed, run.config, run.features_folder / f"{skill.name}-replay.npy")
    before, kept = run.evaluate(), take_snapshot(run)
    run.state.teacher_gate = copy_gate(run.model)
    run.pool.unfreeze(expert_id)
    run.optimizers.init(run.model)
    with run.timers.time("steps"):
        after = learn_skill(run, mixed, studied, expert_id)
    after = after or run.evaluate()
    run.pool.freeze(expert_id)
    rise = {name: after[name].loss - found.loss for name, found in before.items()}
    if studied.features is not None:
        studied.features.delete()
    verdict = judge_refinement(run.config, run.state, run.skills, rise, names, skill.name)
    if not verdict.kept:
        restore_snapshot(run, kept)
        console.info(f"  rolled back: {verdict.reason}; expert {expert_id} is as it was")
        return before, verdict
    console.info(f"  refined expert {expert_id}: {verdict.reason}")
    return after, verdict


def judge_refinement(
    config: Config,
    state: TrainerState,
    skills: list[Skill],
    rise: Mapping[str, float],
    earlier: Collection[str],
    name: str,
) -> RefinementVerdict:
    """Whether a refinement is kept. rise: nats each domain's loss went up by; earlier: the expert's own skills before it;
    name: the skill's."""
    epsilon = config.growth.epsilon
    learned = {skill.name for skill in skills[: state.skill_index + 1]}
    to_come = {skill.name for skill in skills} - learned
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
    return RefinementVerdict(kept, worst, rise[worst], gain, mean, reason)


def skills_of_expert(library: Library, expert_id: int) -> set[str]:
    """The skills that an expert was trained on."""
    return {entry.skill for entry in library.entries if entry.expert == expert_id}


def mix_replay(config: Config, skill: Skill, earlier: Sequence[Skill], number: int) -> Skill:
    """The skill, the stream's `number`th from 0, and documents of the earlier skills that its expert holds, growth.replay_fraction
    of all."""
    pieces = [piece for each in earlier for piece in each.train.segments]
    share = config.growth.replay_fraction
    rng = generator(config.seed, SeedStream.REFINE_REPLAY, number)
    count = min(len(pieces), round(len(skill.train.segments) * share / (1 - share)))
    # Documents keep apart from the skill's own by their numbers.
    first = 1 + max(piece.document for piece in skill.train.segments)
    chosen = [pieces[i] for i in np.sort(rng.permutation(len(pieces))[:count])]
    replayed = [piece._replace(document=first + number) for number, piece in enumerate(chosen)]
    together = Split([*skill.train.segments, *replayed], skill.train.num_documents + len(replayed))
    return replace(skill, train=together)
