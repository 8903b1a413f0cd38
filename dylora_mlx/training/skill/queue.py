"""The queue of skills that wait for the end of the cooldown.

A novel skill that arrives during the cooldown moves behind the rest of the stream. It is decided again as soon as the
cooldown is over, and at the latest when only waiting skills are left: then nothing would train meanwhile, so the cooldown
ends with the stream.
"""

from __future__ import annotations

from dylora_mlx.data.stream import Skill
from dylora_mlx.growth.decide import policy
from dylora_mlx.growth.decide.policy import Decision
from dylora_mlx.system import console
from dylora_mlx.training.run import TrainingRun


def nothing_else_trains(run: TrainingRun) -> bool:
    """Return whether only waiting skills are left, or a single one: waiting longer would not end the cooldown."""
    left = run.skills[run.state.skill_index :]
    return len(left) <= 1 or all(skill.name in run.state.waiting for skill in left)


def cooldown_is_over(run: TrainingRun) -> bool:
    """Return whether the cooldown does not hold any more."""
    state = run.state
    since = None if state.last_creation is None else state.step - state.last_creation
    return since is None or since >= run.config.growth.cooldown_steps or nothing_else_trains(run)


def postpone(run: TrainingRun, skill: Skill, decision: Decision) -> bool:
    """Move the current skill behind the rest of the stream if the cooldown withholds its expert; return whether it was."""
    state, growth = run.state, run.config.growth
    withheld = decision.novel and not decision.creates
    if not (withheld and decision.cooldown_left) or decision.num_experts >= growth.max_experts:
        return False
    state.waiting = [*(name for name in state.waiting if name != skill.name), skill.name]
    run.skills.append(run.skills.pop(state.skill_index))
    state.order = [each.name for each in run.skills]
    why = policy.why_withheld(decision.num_experts, decision.cooldown_left, growth)
    reason = f"novel, but {why}: it is decided again later"
    run.log.append({
        "step": state.step, "skill": skill.name, "action": "wait", "expert": 0, "similarities": {}, "interval": None,
        "threshold": None, "samples": decision.samples, "tokens": decision.tokens, "reason": reason,
    })  # fmt: skip
    console.info(f"\n{skill.name} waits: {reason}")
    return True


def next_in_line(run: TrainingRun) -> None:
    """Put the skill that waits longest next, if the cooldown is over."""
    state = run.state
    if not state.waiting or not cooldown_is_over(run):
        return
    index = next(i for i, skill in enumerate(run.skills) if skill.name == state.waiting[0])
    run.skills.insert(state.skill_index, run.skills.pop(index))
    state.order = [each.name for each in run.skills]


def restore_order(run: TrainingRun) -> None:
    """Put the skills of a resumed run into the order that was reached. Skills that were added since come last."""
    places = {name: place for place, name in enumerate(run.state.order)}
    run.skills.sort(key=lambda skill: places.get(skill.name, len(places)))
