"""One LoRA with as many parameters as all experts of our method: trained in sequence, with replay, or jointly."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import numpy as np

from dylora_mlx.data.packing import Segment
from dylora_mlx.data.stream import Split
from dylora_mlx.model.experts.lora import Expert
from methods import adapters, training
from methods.bench import Bench, Result, joined
from methods.course import Course


def sequential(bench: Bench) -> Result:
    """Train skill after skill with new optimizer moments for each and no protection against forgetting."""
    return _in_turn(bench, lambda number: bench.skills[number].train)


def with_replay(bench: Bench) -> Result:
    """Train as `sequential`, but from the second skill on, half of the documents come from earlier skills.

    This is experience replay (Rolnick et al. 2019, section 3). All earlier text stays available, unlike in a bounded
    memory.
    """
    return _in_turn(bench, partial(replayed, bench))


def joint(bench: Bench) -> Result:
    """Train once on all skills shuffled together, in as many steps as they have separately.

    This is the reference without continual learning. Its losses after every skill are those at the end.
    """
    course, steps = Course(bench), sum(bench.steps(skill) for skill in bench.skills)
    # Number len(skills) gives a separate seed: numbers 0 to n - 1 are those of the skills.
    expert = course.teach([bench.expert(bench.budget(), 0)], 1, joined(bench.skills), len(bench.skills), steps)
    course.measure(adapters.all_on(course.model, [expert]))
    course.matrix += [dict(course.matrix[-1]) for _ in bench.skills[1:]]
    course.answers += [dict(course.answers[-1]) for _ in bench.skills[1:]]
    return _result(course, expert)


def _in_turn(bench: Bench, documents: Callable[[int], Split]) -> Result:
    course, expert = Course(bench), bench.expert(bench.budget(), 0)
    for number, skill in enumerate(bench.skills):
        expert = course.teach([expert], 1, documents(number), number, bench.steps(skill))
        course.measure(adapters.all_on(course.model, [expert]))
    return _result(course, expert)


def _result(course: Course, expert: Expert) -> Result:
    test = training.losses(course.bench, adapters.all_on(course.model, [expert]), "test")
    return course.result(test, course.bench.parameters(expert.rank))


def replayed(bench: Bench, number: int) -> Split:
    """Return the documents of a skill, and from the second skill on as many documents of earlier skills.

    The skill of each replayed document is drawn uniformly. No document repeats before all of its skill are used.
    """
    new_split = bench.skills[number].train
    if not number:
        return new_split
    rng = np.random.default_rng([bench.seed, 22, number])
    counts = np.bincount(rng.integers(number, size=new_split.num_documents), minlength=number)
    segments, first = list(new_split.segments), new_split.num_documents
    for earlier, count in zip(bench.skills, counts, strict=False):
        order = np.resize(rng.permutation(earlier.train.num_documents), count)
        segments += _renumbered(earlier.train, order.tolist(), first)
        first += int(count)
    return Split(segments, first)


def _renumbered(split: Split, documents: Collection[int], first: int) -> list[Segment]:
    """Return the segments of some documents, which may repeat, renumbered from `first`."""
    by_document: dict[int, list[Segment]] = {}
    for segment in split.segments:
        by_document.setdefault(segment.document, []).append(segment)
    return [
        segment._replace(document=number)
        for number, document in enumerate(documents, first)
        for segment in by_document.get(document, [])
    ]
