"""One LoRA for everything, as large as all of our experts together: in turn, with replay, or all at once."""

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
    """Trained skill after skill without protection, fresh moments for each: forgetting as it is."""
    return _in_turn(bench, lambda number: bench.skills[number].train)


def with_replay(bench: Bench) -> Result:
    """As `sequential`, but from the second skill on half of the documents are earlier skills' (experience replay, Rolnick
    et al. 2019, section 3). All earlier text stays at hand, which no bounded memory would give."""
    return _in_turn(bench, partial(replayed, bench))


def joint(bench: Bench) -> Result:
    """Trained once on all skills shuffled together, in as many steps as they have apart: no continual learning, the mark
    to reach. Its losses after every skill are those at the end."""
    course, steps = Course(bench), sum(bench.steps(skill) for skill in bench.skills)
    # A number of its own: the orders 0 to n - 1 are the skills'.
    expert = course.teach([bench.expert(bench.budget(), 0)], 1, joined(bench.skills), len(bench.skills), steps)
    course.measure(adapters.all_on(course.model, [expert]))
    course.matrix += [dict(course.matrix[-1]) for _ in bench.skills[1:]]
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
    """The documents of a skill, and from the second on as many of earlier ones: the skill of each is drawn uniformly, and
    none comes twice before all of its skill have come."""
    own = bench.skills[number].train
    if not number:
        return own
    rng = np.random.default_rng([bench.seed, 22, number])
    wanted = np.bincount(rng.integers(number, size=own.num_documents), minlength=number)
    pieces, first = list(own.segments), own.num_documents
    for earlier, count in zip(bench.skills, wanted, strict=False):
        order = np.resize(rng.permutation(earlier.train.num_documents), count)
        pieces += _renumbered(earlier.train, order.tolist(), first)
        first += int(count)
    return Split(pieces, first)


def _renumbered(split: Split, documents: Collection[int], first: int) -> list[Segment]:
    """Some documents of a split, the same one maybe twice, numbered from `first` on."""
    of: dict[int, list[Segment]] = {}
    for piece in split.segments:
        of.setdefault(piece.document, []).append(piece)
    return [
        piece._replace(document=number)
        for number, document in enumerate(documents, first)
        for piece in of.get(document, [])
    ]
