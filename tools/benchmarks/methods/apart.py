"""Experts trained each by itself, and what they reach if somebody says which one a text is for."""

from __future__ import annotations

from typing import NamedTuple

from dylora_mlx.model.experts.lora import Expert
from methods import adapters, training
from methods.bench import Bench, Result, Row
from methods.course import Course, base_losses

Owned = dict[int, Expert]
"""Experts by their owner's number, in order of arrival."""


class Apart(NamedTuple):
    """after: the experts as they were after each skill of the stream; course: what training them took."""

    after: list[Owned]
    course: Course

    @property
    def parameters(self) -> int:
        """Adapter parameters of all experts."""
        return sum(self.course.bench.parameters(expert.rank) for expert in self.after[-1].values())


def base_alone(bench: Bench) -> Result:
    """Nothing is learned."""
    matrix = [base_losses(bench) for _ in range(len(bench.skills) + 1)]
    return Result(matrix, base_losses(bench, "test"), 0, 0, 0, 0.0)


def experts(bench: Bench) -> Apart:
    """An expert for each owner, trained alone on its skills in order of arrival, with fresh moments for each."""
    course, now, after = Course(bench), Owned(), []
    for number, skill in enumerate(bench.skills):
        owner = bench.owners[skill.name]
        expert = now[owner] if owner in now else bench.expert(bench.config.model.rank, owner)
        now = {**now, owner: course.teach([expert], 1, skill.train, number, bench.steps(skill))}
        after.append(now)
    return Apart(after, course)


def oracle(bench: Bench, experts: Apart) -> Result:
    """Every text goes to its owner's expert, that of a skill still to come and what the base knows to the base.

    Nothing can be forgotten but by an expert that a later skill goes on training, and no routing errs: the mark for
    routing.
    """
    matrix = [base_losses(bench)]
    for number, skill in enumerate(bench.skills):
        owner, arrived = bench.owners[skill.name], bench.names[: number + 1]
        changed = [name for name in arrived if bench.owners[name] == owner]
        matrix.append({**matrix[-1], **_by(experts, number, owner, "validation", changed)})
    test = base_losses(bench, "test")
    for owner in experts.after[-1]:
        names = [name for name in bench.names if bench.owners[name] == owner]
        test |= _by(experts, len(bench.skills) - 1, owner, "test", names)
    course = experts.course
    return Result(matrix, test, experts.parameters, course.steps, course.tokens, course.clock.seconds)


def _by(experts: Apart, number: int, owner: int, split: str, names: list[str]) -> Row:
    """Losses of some domains under one expert as it was after a skill."""
    course = experts.course
    forward = adapters.all_on(course.model, [experts.after[number][owner]])
    return training.losses(course.bench, forward, split, names)
