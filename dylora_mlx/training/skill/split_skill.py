"""Split a skill with documents of several kinds into parts, which replace it in the stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from dylora_mlx.config import Config
from dylora_mlx.data.packing import Segment
from dylora_mlx.data.skills import SPLITS
from dylora_mlx.data.stream import Skill, Split
from dylora_mlx.distributed.group import world
from dylora_mlx.growth import exemplars
from dylora_mlx.growth.novelty.split import find_parts
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.system import console
from dylora_mlx.system.seeds import SeedStream, generator
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill.base_pass import BasePass, document_means
from dylora_mlx.training.step.domains import Domain, make_held_out
from dylora_mlx.training.step.evaluate import evaluate

Assignment = dict[str, list[int]]
"""For each data split, the part of each of its documents, counted from 0."""
MIN_HELD_OUT = 2
"""Least number of documents in a part's validation and test splits. A smaller split is replaced by training text."""


def split_if_mixed(run: TrainingRun, skill: Skill, base_pass: BasePass, evaluates: bool = True) -> bool:
    """Split the skill at `run.state.skill_index` into parts if its documents are of several kinds; return whether it was.

    The parts replace the skill in the stream. A part is never split again, and no part may have fewer than
    growth.min_samples training documents. Unless `evaluates` is False, the loss matrix gets the parts' losses.
    """
    growth = run.config.growth
    if not growth.split or any(skill.name.startswith(f"{name}.") for name in run.state.skill_parts):
        return False
    rng = generator(run.config.seed, SeedStream.SKILL_SPLIT, run.state.skill_index)
    partition = find_parts(
        base_pass.means, run.space, growth, rng, skill.train.document_tokens(base_pass.documents.tolist())
    )
    # All ranks must take the same branch, because the code below is collective.
    if world().broadcast_object(partition.parts) < 2:
        return False
    rows = run.config.data.max_seq_length, run.config.training.batch_size
    splits: dict[str, Split] = {name: getattr(skill, name) for name in SPLITS}
    assignment = {
        name: partition.assign(
            document_means(run.model, split.segments, split.num_documents, *rows),
            split.document_tokens(range(split.num_documents)),
        ).tolist()
        for name, split in splits.items()
    }
    assignment = world().broadcast_object(assignment)
    parts = divide_skill(skill, assignment)
    if min(part.train.num_documents for part in parts) < growth.min_samples:
        return False
    run.state.skill_parts[skill.name] = assignment
    _replace_in_stream(run, skill, parts, evaluates)
    if run.state.order:
        run.state.order = [each.name for each in run.skills]
    sizes = ", ".join(f"{part.name} ({part.train.num_documents} documents)" for part in parts)
    console.info(f"\n{skill.name} holds documents of {len(parts)} kinds: {sizes}")
    return True


def reapply_splits(run: TrainingRun) -> None:
    """Redo the splits of earlier skills when a run is resumed."""
    for skill in list(run.skills):
        if skill.name in run.state.skill_parts:
            _replace_in_stream(run, skill, divide_skill(skill, run.state.skill_parts[skill.name]), evaluates=False)


def skill_exemplars(config: Config, skill: Skill) -> list[Segment]:
    """Draw the documents of a skill that are kept for replay.

    The draw is seeded by the digest of the skill's tokens, so it does not depend on the skill's place in the stream.
    """
    digest = skill.token_digest or skill.digest
    rng = generator(config.seed, SeedStream.EXEMPLARS, int(digest.partition(".")[0][:8], 16))
    return exemplars.choose_exemplars(skill.train.segments, config.training.replay_tokens, rng)


def divide_skill(skill: Skill, assignment: Assignment) -> list[Skill]:
    """Divide a skill into parts called NAME.1, NAME.2 and so on."""
    count = 1 + max(assignment["train"])
    parts = []
    for number in range(count):
        name = f"{skill.name}.{number + 1}"
        part_splits = {s: _select_part(getattr(skill, s), assignment[s], number) for s in SPLITS}
        for held_out in SPLITS[1:]:
            if part_splits[held_out].num_documents < MIN_HELD_OUT:
                part_splits["train"], part_splits[held_out] = _hold_out(part_splits["train"])
        parts.append(
            replace(
                skill,
                name=name,
                source=replace(skill.source, name=name),
                **part_splits,
                digest=f"{skill.digest}.{number}",
                token_digest=f"{skill.token_digest}.{number}",
            )
        )
    return parts


def _select_part(split: Split, labels: Sequence[int], number: int) -> Split:
    """Return the documents of one part, renumbered from 0."""
    return split.select([document for document, label in enumerate(labels) if label == number])


def _hold_out(train: Split) -> tuple[Split, Split]:
    """Hold out the last tenth of the documents, at least MIN_HELD_OUT. Returns (remaining, held out)."""
    count = max(MIN_HELD_OUT, train.num_documents // 10)
    labels = [int(number >= train.num_documents - count) for number in range(train.num_documents)]
    return _select_part(train, labels, 0), _select_part(train, labels, 1)


def _replace_in_stream(run: TrainingRun, skill: Skill, parts: list[Skill], evaluates: bool) -> None:
    """Replace a skill by its parts in the stream and add their domains, and if `evaluates`, their losses so far."""
    index = run.skills.index(skill)
    run.skills[index : index + 1] = parts
    new = make_held_out(parts, run.config, run.compiled)
    run.domains |= new.validation
    run.final_domains |= new.final
    run.tests |= new.test
    if evaluates:
        add_domains(run, new.validation)


def add_domains(run: TrainingRun, domains: dict[str, Domain]) -> None:
    """Add the losses of new domains to the run's loss matrix.

    The first row gets the losses of the base, the last row those of the current pool.
    """
    base_routing = Routing(None, mx.array(1.0))
    base_losses = {
        n: evaluate(run.model, domain, base_routing, 0, evaluator=run.evaluator).loss for n, domain in domains.items()
    }
    pool_losses = (
        {name: evaluation.loss for name, evaluation in run.evaluate(domains).items()}
        if len(run.state.matrix) > 1
        else base_losses
    )
    run.state.matrix[0] |= base_losses
    run.state.matrix[-1] |= pool_losses
