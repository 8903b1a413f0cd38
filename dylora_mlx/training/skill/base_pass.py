"""What the base says of texts before anything of them is learned: of a skill, in one pass, and of the reference."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx import assets
from dylora_mlx.config import Config, Source
from dylora_mlx.data import stream
from dylora_mlx.data.packing import Batch, Segment
from dylora_mlx.data.stream import Skill, evaluation_batches
from dylora_mlx.distributed.group import is_main_process, world
from dylora_mlx.errors import UserError
from dylora_mlx.growth.gate_init import FeatureStatistics, StatisticsAccumulator
from dylora_mlx.growth.novelty import embedding
from dylora_mlx.growth.novelty.embedding import DocumentMeans, Reference
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder import attention
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.kernels import streams
from dylora_mlx.model.routing import document_mean
from dylora_mlx.system import console
from dylora_mlx.system.seeds import SeedStream, generator
from dylora_mlx.training.checkpoint.feature_cache import BYTES_PER_VALUE, FeatureCache, FeatureWriter

CHUNK = 8
"""Batches whose states are held at a time."""


class BasePass(NamedTuple):
    """Document means float32 [n, D] for novelty and the numbers of these documents [n], the router's statistics and a
    sample of its features float32 [m, D], and the features of every piece where they are kept."""

    means: np.ndarray
    documents: np.ndarray
    statistics: FeatureStatistics
    memory: np.ndarray
    features: FeatureCache | None


class BaseStates(NamedTuple):
    """Of a batch's N real positions, in order: the base's final-norm states and the router's features, float32 [N, D].

    With tap final both are one array.
    """

    batch: Batch
    final: np.ndarray
    features: np.ndarray


def base_states(
    model: RoutedDecoder, segments: Sequence[Segment], max_seq_length: int, batch_size: int
) -> Iterator[BaseStates]:
    """States of the base alone over all pieces, batch by batch. Packing does not change them: they serve any packing."""
    yield from iterate_states(model, evaluation_batches(segments, max_seq_length, batch_size))


def iterate_states(model: RoutedDecoder, batches: Sequence[Batch]) -> Iterator[BaseStates]:
    """States of the base alone over some batches, a few of these at a time. Every rank computes its share, and has the
    states of all."""

    def computed(batch: Batch) -> list[mx.array]:
        final, read = model.states_and_features(
            mx.array(batch.inputs), attention.attention_layout(batch.segment_ids, model.window)
        )
        return [found.astype(mx.float32) for found in ([final] if read is final else [final, read])]

    group = world()
    size = max(CHUNK, group.world_size)
    chunks = range(0, len(batches), size)
    for begin in console.track(chunks, "  reading with the base", len(chunks)):
        group.raise_if_stop_requested("stopped before the skill was learned; nothing is lost, go on with --resume")
        together = batches[begin : begin + size]
        own = group.shard(together)
        found = streams.run_concurrently([partial(computed, batch) for batch in own])
        real = [[np.array(states)[b.segment_ids > 0] for states in kinds] for b, kinds in zip(own, found, strict=True)]
        if group.world_size > 1:
            shape = (1 if model.router_layer == "final" else 2, model.base.args.hidden_size)
            real = _gather_states(together, real, shape)
        for batch, kinds in zip(together, real, strict=True):
            yield BaseStates(batch, kinds[0], kinds[-1])


def _gather_states(
    batches: Sequence[Batch], own: list[list[np.ndarray]], shape: tuple[int, int]
) -> list[list[np.ndarray]]:
    """The states of all batches from those of this rank's, shape[0] arrays [N, shape[1]] each."""
    group = world()
    counts = [int((batch.segment_ids > 0).sum()) for batch in batches]
    nothing = np.zeros((0, shape[0] * shape[1]), np.float32)
    rows = np.concatenate([nothing, *(np.concatenate(states, axis=1) for states in own)])
    dealt = group.all_gather(rows, [sum(counts[rank :: group.world_size]) for rank in range(group.world_size)])
    found: list[list[np.ndarray]] = [[] for _ in batches]
    for rank, part in enumerate(dealt):
        mine = range(rank, len(batches), group.world_size)
        ends = np.cumsum([counts[place] for place in mine])[:-1]
        for place, block in zip(mine, np.split(part, ends) if mine else [], strict=True):
            found[place] = np.split(block, shape[0], axis=1)
    return found


class RowSample:
    """`count` rows drawn at random from all the rows of some pieces, wherever and in whatever order they come by."""

    def __init__(self, pieces: Sequence[Segment], dims: int, count: int, rng: np.random.Generator):
        self._starts = np.cumsum([0, *(piece.positions for piece in pieces)])
        drawn = rng.permutation(self._starts[-1])[:count]
        self._order = np.argsort(drawn)
        self._places = drawn[self._order]
        self.rows = np.zeros((len(drawn), dims), np.float32)

    def add(self, index: int, rows: np.ndarray) -> None:
        """Take what was drawn of one piece, rows [positions, D]."""
        start = self._starts[index]
        low, high = np.searchsorted(self._places, [start, start + len(rows)])
        self.rows[self._order[low:high]] = rows[self._places[low:high] - start]


def run_base_pass(model: RoutedDecoder, skill: Skill, config: Config, keep: Path | None = None) -> BasePass:
    """Run the base over the skill's training documents: all of them, or a sample if their features exceed the cache.

    keep: where to keep the features of every piece, if training can use them. Raises UserError for a state that is not
    finite.
    """
    growth, dims = config.growth, model.base.args.hidden_size
    rng = _skill_generator(config.seed, skill.name)
    pieces, whole = _segments_to_read(skill, config, dims, rng)
    documents = np.unique([piece.document for piece in pieces])
    embedded = embedding.sample_documents(documents, growth.embedding_samples, growth.batch_samples, rng)
    means = DocumentMeans(embedded, dims)
    sums, memory = StatisticsAccumulator(dims), RowSample(pieces, dims, config.training.memory_tokens, rng)
    writer = FeatureWriter(keep, pieces, dims) if keep and whole and model.router_layer == "final" else None
    with np.errstate(invalid="ignore"), writer or nullcontext():  # what is not finite is looked for below
        for found in base_states(model, pieces, config.data.max_seq_length, config.training.batch_size):
            read = document_mean.mix_document_mean_packed(
                found.features, found.batch.segment_ids, model.document_mean_weight
            )
            sums.add(read)
            for index, rows in _rows_by_segment(found.batch, pieces):
                means.add(pieces[index].document, found.final[rows])
                memory.add(index, read[rows])
            if writer:
                writer.add(found.batch, found.features)
    kept = _finish_features(writer, skill.name)
    study = BasePass(means.means().astype(np.float32), embedded, sums.statistics(), memory.rows, kept)
    if not (np.isfinite(study.means).all() and np.isfinite(study.statistics.total).all()):
        raise UserError(f"skill '{skill.name}': the base's states are not finite; use --model.dtype float32")
    return study


def segments_to_read(skill: Skill, config: Config, dims: int) -> tuple[list[Segment], bool]:
    """The pieces that the base reads of a skill, and whether these are all, so that their features may be kept."""
    return _segments_to_read(skill, config, dims, _skill_generator(config.seed, skill.name))


def _segments_to_read(skill: Skill, config: Config, dims: int, rng: np.random.Generator) -> tuple[list[Segment], bool]:
    pieces = skill.train.segments
    if skill.train.num_tokens * dims * BYTES_PER_VALUE <= config.data.feature_cache_mb << 20:
        return pieces, True
    chosen = set(rng.permutation(skill.train.num_documents)[: config.growth.embedding_samples].tolist())
    return [piece for piece in pieces if piece.document in chosen], False


def _skill_generator(seed: int, name: str) -> np.random.Generator:
    """What is drawn of a skill follows from the run's seed and a number that stands for its name."""
    return generator(seed, SeedStream.BASE_PASS, int.from_bytes(name.encode()[:8].ljust(8, b"\0"), "big") >> 1)


def load_reference_statistics(base: Base, model: RoutedDecoder, config: Config) -> Reference:
    """Statistics that ship with the base, or were computed before; else those of the packaged skills' texts, kept for
    the next run."""
    dims = base.args.hidden_size
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dylora_mlx"
    cached = home / f"reference-{base.fingerprint[:32]}.safetensors"
    kept = next((path for path in (base.folder / "reference.safetensors", cached) if path.is_file()), None)
    if not world().any_rank(kept is None) and kept is not None:  # what one lacks, all compute together
        return embedding.load_reference(kept, dims)
    found: list[np.ndarray] = []
    for name in assets.packaged_skills():
        text = stream.prepare_skill(Source(name=name, source=f"packaged/{name}"), config.data, base.tokenizer, 0)
        pieces = (*text.validation.segments, *text.test.segments)
        passed = base_states(model, pieces, config.data.max_seq_length, config.training.batch_size)
        found += [part.final for part in passed]
    made = embedding.compute_reference(found)
    if not is_main_process():
        return made
    try:
        embedding.save_reference(made, cached)
    except (OSError, RuntimeError) as error:  # MLX raises the second kind
        cached.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or error
        console.warn(f"{cached}: the reference could not be kept ({why}); it is computed again next time")
    return made


def _rows_by_segment(batch: Batch, pieces: Sequence[Segment]) -> Iterator[tuple[int, slice]]:
    """Each piece's number, and where its rows stand among the batch's real positions."""
    at = 0
    for index in (i for row in batch.rows for i in row):
        end = at + pieces[index].positions
        yield index, slice(at, end)
        at = end


def _finish_features(writer: FeatureWriter | None, name: str) -> FeatureCache | None:
    if writer is None:
        return None
    kept = writer.finish()
    if kept is None:
        console.warn(f"{name}: features are computed again at every step, they could not be kept ({writer.failure})")
    return kept
