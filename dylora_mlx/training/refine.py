"""Refine the expert of a known skill: more training, with replay of what it already holds, undone if that is harmed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dylora_mlx.data.stream import Skill, Split
from dylora_mlx.training import display, recall, rollback
from dylora_mlx.training import state as states
from dylora_mlx.training.evaluate import Evaluation
from dylora_mlx.training.learn import learn
from dylora_mlx.training.run import Run
from dylora_mlx.training.study import examine


def refine(run: Run, skill: Skill) -> dict[str, Evaluation]:
    """Go on training the matched expert on the skill and on documents of its earlier skills.

    Kept only if no domain loses more than growth.epsilon nats against the evaluation before, else rolled back exactly; of
    skills that are still to come nothing is asked.
    A run that is stopped meanwhile resumes from before: a checkpoint within would not know what to go back to. Returns
    the evaluation of what is left.
    """
    decision = run.state.decision
    assert decision is not None
    column, epsilon = decision["expert"], run.config.growth.epsilon
    mixed = with_replay(run, skill, column)
    studied = examine(run.model, mixed, run.config, run.features / f"{skill.name}-replay.npy")
    before, kept = run.evaluate(), rollback.keep(run)
    run.state.mature = recall.mature_gate(run.model)
    run.pool.thaw(column)
    run.optimizers.init(run.model)
    after = learn(run, mixed, studied, column, save=lambda _: None) or run.evaluate()
    run.pool.freeze(column)
    to_come = {later.name for later in run.skills[run.state.skill + 1 :]}
    rise = {name: after[name].loss - found.loss for name, found in before.items() if name not in to_come}
    worst = max(rise, key=lambda name: rise[name])
    if studied.features is not None:
        studied.features.delete()
    gained = -rise[skill.name]
    if rise[worst] > epsilon or gained <= 0:
        rollback.restore(run, kept)
        why = f"{worst} lost {rise[worst]:.3f} nats" if rise[worst] > epsilon else "it did not improve"
        display.say(f"  rolled back: {why} (allowed {epsilon:.3f}); expert {column} is as it was")
        decision["refined"] = {"kept": False, "worst": worst, "rise": rise[worst], "gain": gained}
        return before
    display.say(
        f"  refined expert {column}: {gained:+.3f} nats gained; the largest loss was {worst} {rise[worst]:+.3f}"
    )
    decision["refined"] = {"kept": True, "worst": worst, "rise": rise[worst], "gain": gained}
    return after


def with_replay(run: Run, skill: Skill, column: int) -> Skill:
    """The skill, and documents of the skills that the expert holds, growth.replay of all."""
    held = {entry.skill for entry in run.library.entries if entry.expert == column}
    pieces = [piece for earlier in run.skills if earlier.name in held for piece in earlier.train.pieces]
    share = run.config.growth.replay
    rng = states.rng(run.config.seed, 8, run.state.skill)
    count = min(len(pieces), round(len(skill.train.pieces) * share / (1 - share)))
    # Documents keep apart from the skill's own by their numbers.
    first = 1 + max(piece.document for piece in skill.train.pieces)
    chosen = [pieces[i] for i in np.sort(rng.permutation(len(pieces))[:count])]
    replayed = [piece._replace(document=first + number) for number, piece in enumerate(chosen)]
    together = Split([*skill.train.pieces, *replayed], skill.train.documents + len(replayed))
    return replace(skill, train=together)
