"""A skill arrives: if its documents are of several kinds, its parts take its place in the stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from dylora_mlx.config import Config
from dylora_mlx.data.packing import Segment
from dylora_mlx.data.skills import SPLITS
from dylora_mlx.data.stream import Skill, Split
from dylora_mlx.distributed.group import world
from dylora_mlx.growth import exemplars
from dylora_mlx.growth.novelty.embedding import DocumentMeans
from dylora_mlx.growth.novelty.split import find_parts
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.system import console
from dylora_mlx.system.seeds import SeedStream, generator
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill.base_pass import BasePass, base_states
from dylora_mlx.training.step.evaluate import Domain, evaluate, make_domains

Assignment = dict[str, list[int]]
"""By split of the data, the part (from 0) of each of its documents."""
MIN_HELD_OUT = 2
"""Documents that validation and test of a part have at least; they come from its training documents if need be."""


def split_if_mixed(run: TrainingRun, skill: Skill, study: BasePass) -> bool:
    """Put the skill's parts in its place in the stream if it has several; return whether that was done."""
    growth = run.config.growth
    if not growth.split or any(skill.name.startswith(f"{name}.") for name in run.state.skill_parts):
        return False
    rng = generator(run.config.seed, SeedStream.SKILL_SPLIT, run.state.skill_index)
    found = find_parts(study.means, run.space, growth, rng, skill.train.document_tokens(study.documents.tolist()))
    if world().broadcast_object(found.parts) < 2:
        return False
    splits: dict[str, Split] = {name: getattr(skill, name) for name in SPLITS}
    assignment = {
        name: found.assign(
            _means(run.config, run.base, run.model, split), split.document_tokens(range(split.num_documents))
        ).tolist()
        for name, split in splits.items()
    }
    assignment = world().broadcast_object(assignment)
    parts = divide_skill(skill, assignment)
    if min(part.train.num_documents for part in parts) < growth.min_samples:
        return False
    run.state.skill_parts[skill.name] = assignment
    _replace_in_stream(run, skill, parts)
    sizes = ", ".join(f"{part.name} ({part.train.num_documents} documents)" for part in parts)
    console.info(f"\n{skill.name} holds documents of {len(parts)} kinds: {sizes}")
    return True


def reapply_splits(run: TrainingRun) -> None:
    """Split again, when a run is resumed, what was split before."""
    for skill in list(run.skills):
        if skill.name in run.state.skill_parts:
            _replace_in_stream(run, skill, divide_skill(skill, run.state.skill_parts[skill.name]), measured=True)


def skill_exemplars(config: Config, skill: Skill) -> list[Segment]:
    """The documents of a skill that are kept for replay; drawn by its digest, so that its place in the stream does not
    matter."""
    rng = generator(config.seed, SeedStream.EXEMPLARS, int(skill.digest.partition(".")[0][:8], 16))
    return exemplars.choose_exemplars(skill.train.segments, config.training.replay_tokens, rng)


def divide_skill(skill: Skill, assignment: Assignment) -> list[Skill]:
    """The parts of a skill, called NAME.1, NAME.2, and so on."""
    count = 1 + max(assignment["train"])
    parts = []
    for number in range(count):
        name = f"{skill.name}.{number + 1}"
        found = {s: _chosen(getattr(skill, s), assignment[s], number) for s in SPLITS}
        for held_out in SPLITS[1:]:
            if found[held_out].num_documents < MIN_HELD_OUT:
                found["train"], found[held_out] = _held_out(found["train"])
        source = replace(skill.source, name=name)
        parts.append(
            Skill(name, source, found["train"], found["validation"], found["test"], f"{skill.digest}.{number}")
        )
    return parts


def _means(config: Config, base: Base, model: RoutedDecoder, documents: Split) -> np.ndarray:
    """Mean base states of all documents of a split, float64 [n, D], in order."""
    means = DocumentMeans(np.arange(documents.num_documents), base.args.hidden_size)
    for found in base_states(model, documents.segments, config.data.max_seq_length, config.training.batch_size):
        at = 0
        for index in (i for row in found.batch.rows for i in row):
            piece = documents.segments[index]
            means.add(piece.document, found.final[at : at + piece.positions])
            at += piece.positions
    return means.means()


def _chosen(whole: Split, parts: Sequence[int], number: int) -> Split:
    """The documents of one part, numbered anew."""
    numbers = {document: new for new, document in enumerate(i for i, part in enumerate(parts) if part == number)}
    pieces = [p._replace(document=numbers[p.document]) for p in whole.segments if p.document in numbers]
    return Split(pieces, len(numbers))


def _held_out(train: Split) -> tuple[Split, Split]:
    """The last tenth of the documents, for validation or test, and what is left."""
    count = max(MIN_HELD_OUT, train.num_documents // 10)
    labels = [int(number >= train.num_documents - count) for number in range(train.num_documents)]
    return _chosen(train, labels, 0), _chosen(train, labels, 1)


def _replace_in_stream(run: TrainingRun, skill: Skill, parts: list[Skill], measured: bool = False) -> None:
    """Put parts in a skill's place, as domains of their own; their losses so far go into the matrix."""
    place = run.skills.index(skill)
    run.skills[place : place + 1] = parts
    shape = (run.config.data.max_seq_length, run.config.training.batch_size, run.compiled)
    run.domains |= (own := make_domains({part.name: part.validation for part in parts}, *shape))
    run.tests |= make_domains({part.name: part.test for part in parts}, *shape)
    if not measured:
        add_domains(run, own)


def add_domains(run: TrainingRun, domains: dict[str, Domain]) -> None:
    """Put the losses of domains that were not there at the beginning into the matrix: the base's, and those of now."""
    base = Routing(None, mx.array(1.0))
    alone = {n: evaluate(run.model, d, base, 0, evaluator=run.evaluator).loss for n, d in domains.items()}
    routed = {name: found.loss for name, found in run.evaluate(domains).items()} if len(run.state.matrix) > 1 else alone
    run.state.matrix[0] |= alone
    run.state.matrix[-1] |= routed
