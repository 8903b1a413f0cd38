"""Callbacks of programs: methods that a run calls after a step, an evaluation, a decision and a skill.

An exception of a callback ends the run as a signal does: at the next safe place, with a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from dylora_mlx.errors import UserError
from dylora_mlx.growth.decide.policy import Decision
from dylora_mlx.system import signals


class StepEvent(NamedTuple):
    """An optimization step."""

    step: int
    """Steps so far, over all skills."""
    skill: str
    """The skill that is learned."""
    skill_step: int
    """Steps so far of this skill."""
    loss: float
    """Cross-entropy of the step's text, in nats per token; not finite if the update was skipped."""
    learning_rate: float
    """Learning rate of the experts."""


class EvaluationEvent(NamedTuple):
    """An evaluation on held-out text."""

    step: int
    skill: str | None
    """The skill that is learned, or was; None for the base before the first skill."""
    losses: dict[str, float]
    """Validation loss by domain, in nats per token: every domain after a skill (above `eval.total_tokens` a selection), the
    watched ones while it is learned."""
    after_skill: bool
    """Whether the skill has ended."""


class DecisionEvent(NamedTuple):
    """A decision about a skill, before it is carried out."""

    step: int
    decision: Decision


class SkillEvent(NamedTuple):
    """A skill that has ended."""

    step: int
    skill: str
    action: str
    """create, refine, reuse or skip, as decided."""
    expert_id: int
    """The expert that serves the skill now; 0 is the base. It may differ from the decision's if training was undone."""
    base_loss: float
    """Validation loss of the base on the skill, in nats per token."""
    loss: float
    """Validation loss of the mixture now."""


@runtime_checkable
class Callback(Protocol):
    """What a program may do as a run goes on. Inherit from it and define the methods that are needed.

    With several ranks each process calls its own callbacks. Events are values: changing them changes nothing.
    """

    def on_step(self, event: StepEvent) -> None:
        """Called after every optimization step."""

    def on_evaluation(self, event: EvaluationEvent) -> None:
        """Called after every evaluation on held-out text."""

    def on_decision(self, event: DecisionEvent) -> None:
        """Called after every decision."""

    def on_skill(self, event: SkillEvent) -> None:
        """Called after every skill, before its checkpoint is written."""


class Callbacks:
    """The callbacks of a run. The first exception is kept, asks the run to stop, and ends the calls.

    Raises UserError for an object that is no callback.
    """

    def __init__(self, callbacks: Sequence[Callback] = ()):
        for each in callbacks:
            if isinstance(each, type) or not isinstance(each, Callback):
                name = f"the class {each.__name__}" if isinstance(each, type) else repr(each)
                raise UserError(
                    f"callbacks: {name:.80} is not an object of a class that inherits from dylora_mlx.Callback"
                )
        self.callbacks = tuple(callbacks)
        self.failure: tuple[str, Exception] | None = None
        """A description of the exception, and the exception itself."""

    def __bool__(self) -> bool:
        return bool(self.callbacks)

    def on_step(self, event: StepEvent) -> None:
        """Call every callback's `on_step`."""
        self._call("on_step", event)

    def on_evaluation(self, event: EvaluationEvent) -> None:
        """Call every callback's `on_evaluation`."""
        self._call("on_evaluation", event)

    def on_decision(self, event: DecisionEvent) -> None:
        """Call every callback's `on_decision`."""
        self._call("on_decision", event)

    def on_skill(self, event: SkillEvent) -> None:
        """Call every callback's `on_skill`."""
        self._call("on_skill", event)

    def _call(self, name: str, event: Any) -> None:
        for callback in self.callbacks if self.failure is None else ():
            try:
                getattr(callback, name)(event)
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200].removesuffix(":")
                self.failure = (f"callback {type(callback).__name__}.{name} raised {reason}", error)
                signals.request_stop()
                return
