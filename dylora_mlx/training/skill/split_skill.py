"""A skill arrives: if its documents are of several kinds, its parts take its place in the stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from dylora_mlx.config import Config
from dylora_mlx.data.packing import Piece
from dylora_mlx.data.skills import SPLITS
from dylora_mlx.data.stream import Skill, Split
from dylora_mlx.distributed import group as ranks
from dylora_mlx.growth import exemplars
from dylora_mlx.growth.novelty import split as mixture
from dylora_mlx.growth.novelty.embedding import DocumentMeans
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.system import console
from dylora_mlx.system.seeds import SeedStream, generator
from dylora_mlx.training.run import Run
from dylora_mlx.training.skill.base_pass import Study, base_states
from dylora_mlx.training.step import evaluate
from dylora_mlx.training.step.evaluate import Domain

Assignment = dict[str, list[int]]
"""By split of the data, the part (from 0) of each of its documents."""
HELD_OUT = 2
"""Documents that validation and test of a part have at least; they come from its training documents if need be."""


def split(run: Run, skill: Skill, study: Study) -> bool:
    """Put the skill's parts in its place in the stream if it has several; return whether that was done."""
    growth = run.config.growth
    if not growth.split or any(skill.name.startswith(f"{name}.") for name in run.state.parts):
        return False
    rng = generator(run.config.seed, SeedStream.SKILL_SPLIT, run.state.skill)
    found = mixture.partition(study.means, run.space, growth, rng, skill.train.words(study.documents.tolist()))
    if ranks.group().first(found.parts) < 2:
        return False
    splits: dict[str, Split] = {name: getattr(skill, name) for name in SPLITS}
    assignment = {
        name: found.assign(_means(run, split), split.words(range(split.documents))).tolist()
        for name, split in splits.items()
    }
    assignment = ranks.group().first(assignment)
    parts = divide(skill, assignment)
    if min(part.train.documents for part in parts) < growth.min_samples:
        return False
    run.state.parts[skill.name] = assignment
    _take_place(run, skill, parts)
    sizes = ", ".join(f"{part.name} ({part.train.documents} documents)" for part in parts)
    console.say(f"\n{skill.name} holds documents of {len(parts)} kinds: {sizes}")
    return True


def replay(run: Run) -> None:
    """Split again, when a run is resumed, what was split before."""
    for skill in list(run.skills):
        if skill.name in run.state.parts:
            _take_place(run, skill, divide(skill, run.state.parts[skill.name]), measured=True)


def exemplars_of(config: Config, skill: Skill) -> list[Piece]:
    """The documents of a skill that are kept for replay; drawn by its digest, so that its place in the stream does not
    matter."""
    rng = generator(config.seed, SeedStream.EXEMPLARS, int(skill.digest.partition(".")[0][:8], 16))
    return exemplars.choose(skill.train.pieces, config.training.replay_tokens, rng)


def divide(skill: Skill, assignment: Assignment) -> list[Skill]:
    """The parts of a skill, called NAME.1, NAME.2, and so on."""
    count = 1 + max(assignment["train"])
    parts = []
    for number in range(count):
        name = f"{skill.name}.{number + 1}"
        found = {s: _chosen(getattr(skill, s), assignment[s], number) for s in SPLITS}
        for held_out in SPLITS[1:]:
            if found[held_out].documents < HELD_OUT:
                found["train"], found[held_out] = _held_out(found["train"])
        source = replace(skill.source, name=name)
        parts.append(
            Skill(name, source, found["train"], found["validation"], found["test"], f"{skill.digest}.{number}")
        )
    return parts


def _means(run: Run, documents: Split) -> np.ndarray:
    """Mean base states of all documents of a split, float64 [n, D], in order."""
    means = DocumentMeans(np.arange(documents.documents), run.base.args.hidden_size)
    for found in base_states(run.model, documents.pieces, run.config.data.row_length, run.config.training.batch_rows):
        at = 0
        for index in (i for row in found.batch.pieces for i in row):
            piece = documents.pieces[index]
            means.add(piece.document, found.final[at : at + piece.positions])
            at += piece.positions
    return means.found()


def _chosen(whole: Split, parts: Sequence[int], number: int) -> Split:
    """The documents of one part, numbered anew."""
    numbers = {document: new for new, document in enumerate(i for i, part in enumerate(parts) if part == number)}
    pieces = [p._replace(document=numbers[p.document]) for p in whole.pieces if p.document in numbers]
    return Split(pieces, len(numbers))


def _held_out(train: Split) -> tuple[Split, Split]:
    """The last tenth of the documents, for validation or test, and what is left."""
    count = max(HELD_OUT, train.documents // 10)
    labels = [int(number >= train.documents - count) for number in range(train.documents)]
    return _chosen(train, labels, 0), _chosen(train, labels, 1)


def _take_place(run: Run, skill: Skill, parts: list[Skill], measured: bool = False) -> None:
    """Put parts in a skill's place, as domains of their own; their losses so far go into the matrix."""
    place = run.skills.index(skill)
    run.skills[place : place + 1] = parts
    shape = (run.config.data.row_length, run.config.training.batch_rows, run.compiled)
    run.domains |= (own := evaluate.domains({part.name: part.validation for part in parts}, *shape))
    run.tests |= evaluate.domains({part.name: part.test for part in parts}, *shape)
    if not measured:
        enter(run, own)


def enter(run: Run, domains: dict[str, Domain]) -> None:
    """Put the losses of domains that were not there at the beginning into the matrix: the base's, and those of now."""
    base = Routing(None, mx.array(1.0))
    alone = {n: evaluate.evaluate(run.model, d, base, 0, measure=run.measure).loss for n, d in domains.items()}
    routed = {name: found.loss for name, found in run.evaluate(domains).items()} if len(run.state.matrix) > 1 else alone
    run.state.matrix[0] |= alone
    run.state.matrix[-1] |= routed
