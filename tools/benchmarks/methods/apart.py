"""Solo experts, each trained alone, and their losses with oracle routing: every text goes to its own expert."""

from __future__ import annotations

from typing import NamedTuple

from dylora_mlx.model.experts.lora import Expert
from methods import adapters, answers, training
from methods.bench import Bench, Result
from methods.course import Course, base_losses

ExpertsByOwner = dict[int, Expert]
"""Experts by owner (Bench.owners), in order of arrival."""


class SoloExperts(NamedTuple):
    """Experts that were each trained alone."""

    after: list[ExpertsByOwner]
    """The experts after each skill of the stream."""
    course: Course
    """Steps, tokens and seconds of their training."""

    @property
    def parameters(self) -> int:
        """Number of adapter parameters of all experts."""
        return sum(self.course.bench.parameters(expert.rank) for expert in self.after[-1].values())


def base_alone(bench: Bench) -> Result:
    """Return the result of the base, with nothing trained."""
    course, times = Course(bench), len(bench.skills) + 1
    course.matrix, course.answers = course.matrix * times, course.answers * times
    return course.result(base_losses(bench, "test"), 0)


def experts(bench: Bench) -> SoloExperts:
    """Train one expert per owner, alone, on its skills in order of arrival, with new moments for each skill."""
    course, current, after = Course(bench), ExpertsByOwner(), []
    for number, skill in enumerate(bench.skills):
        owner = bench.owners[skill.name]
        expert = current[owner] if owner in current else bench.expert(bench.config.model.rank, owner)
        current = {**current, owner: course.teach([expert], 1, skill.train, number, bench.steps(skill))}
        after.append(current)
    return SoloExperts(after, course)


def oracle(bench: Bench, experts: SoloExperts) -> Result:
    """Evaluate oracle routing: every text goes to the expert of its skill's owner.

    Text of a skill that has not arrived, and of the base skill, goes to the base. Routing makes no mistakes, and an
    expert forgets only if a later skill of its owner trains it further. So this is the reference for routing.
    """
    course = experts.course
    course.matrix, course.answers = course.matrix[:1], course.answers[:1]
    for number, skill in enumerate(bench.skills):
        owner, seen_names = bench.owners[skill.name], bench.names[: number + 1]
        retrained = [name for name in seen_names if bench.owners[name] == owner]
        forward = adapters.all_on(course.model, [experts.after[number][owner]])
        changed = training.losses(bench, forward, "validation", retrained)
        course.matrix.append({**course.matrix[-1], **changed})
        changed = answers.accuracies(bench, course.tasks, forward, retrained)
        course.answers.append({**course.answers[-1], **changed})
    test = base_losses(bench, "test")
    for owner in experts.after[-1]:
        names = [name for name in bench.names if bench.owners[name] == owner]
        test |= training.losses(bench, adapters.all_on(course.model, [experts.after[-1][owner]]), "test", names)
    return course.result(test, experts.parameters)
