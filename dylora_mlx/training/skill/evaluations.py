"""When a skill is evaluated while it is learned, and the options that act at evaluations."""

from __future__ import annotations

from dylora_mlx.config import Config
from dylora_mlx.growth import phases
from dylora_mlx.growth.pool import ExpertRecord
from dylora_mlx.system import console


def evaluation_steps(config: Config, steps: int) -> list[int]:
    """Return the step numbers, from 1, after which a skill of `steps` steps is evaluated.

    Every training.steps_per_eval steps, every growth.rank.steps steps if ranks may grow, and after the last step.
    """
    growth = config.growth.rank
    intervals = {config.training.steps_per_eval, *([growth.steps] if growth.epsilon else [])}
    return [step for step in range(1, steps + 1) if step == steps or any(step % every == 0 for every in intervals)]


def warn_of_idle_options(config: Config, skill: str, steps: int, record: ExpertRecord, largest_rank: int) -> None:
    """Warn of each option that acts at evaluations and cannot in the `steps` steps of a skill, with what it needs.

    Args:
        config: the run's options.
        skill: name of the skill.
        steps: number of its steps if it is not stopped early.
        record: the expert that learns it.
        largest_rank: LoRA rank that no expert grows beyond.
    """
    growth, patience = config.growth, config.training.patience
    if growth.rank.epsilon and record.rank * 2 > largest_rank:
        if not record.steps:  # one that is refined may have grown to it
            console.warn(
                f"growth.rank.epsilon does nothing for {skill}: twice its LoRA rank, {record.rank * 2}, is above the largest, "
                f"{largest_rank} (growth.rank.max)"
            )
    elif growth.rank.epsilon and steps <= growth.rank.steps:
        # After the last step a larger rank would not be trained.
        console.warn(
            f"growth.rank.epsilon does nothing for {skill}: it takes {growth.rank.steps + 1} steps at growth.rank.steps "
            f"{growth.rank.steps}, the skill has {steps}"
        )
    if growth.freeze_after >= patience:
        console.warn(
            f"growth.freeze_after does nothing for {skill}: {growth.freeze_after} evaluations without improvement end the "
            f"skill (training.patience {patience})"
        )
    elif growth.freeze_after and not _may_freeze(config, steps):
        console.warn(
            f"growth.freeze_after does nothing for {skill}: {growth.freeze_after} evaluations without improvement, the last "
            f"in the mature phase, take {_steps_to_freeze(config, steps)} steps at training.steps_per_eval "
            f"{config.training.steps_per_eval}, the skill has {steps}"
        )


def _steps_to_freeze(config: Config, steps: int) -> int:
    """Return the smallest number above `steps` in which growth.freeze_after can act."""
    growth = config.growth
    most = config.training.steps_per_eval * (growth.freeze_after + 1) + growth.dense_steps + growth.anneal_steps
    evaluated = (step for step in evaluation_steps(config, most) if step >= steps)
    return next(step + 1 for step in evaluated if _may_freeze(config, step + 1))


def _may_freeze(config: Config, steps: int) -> bool:
    """Return whether enough evaluations lie before the last of `steps` steps, one of them in the mature phase."""
    before_last = [step for step in evaluation_steps(config, steps) if step < steps]
    if not before_last or len(before_last) < config.growth.freeze_after:
        return False
    return phases.routing_schedule(before_last[-1] - 1, steps, config.growth).phase == "mature"
