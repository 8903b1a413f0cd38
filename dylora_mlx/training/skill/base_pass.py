"""Forward passes of the base alone over texts: one over a new skill before it is learned, and one over reference texts.

The pass over a skill yields document embeddings, router statistics, and the feature cache.
"""

from __future__ import annotations

import hashlib
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
from dylora_mlx.data import formatting, packing
from dylora_mlx.data.packing import Batch, Segment
from dylora_mlx.data.records import Record
from dylora_mlx.data.stream import Skill, evaluation_batches
from dylora_mlx.distributed.group import is_main_process, world
from dylora_mlx.errors import UserError
from dylora_mlx.growth.feature_statistics import FeatureStatistics, StatisticsAccumulator
from dylora_mlx.growth.library import half_precision
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
"""Batches whose states are held in memory at a time."""
REFERENCE_LENGTH, REFERENCE_ROWS = 256, 2
"""Positions of a row, and rows of a batch, in which the reference text is read, whatever the run's options."""


class BasePass(NamedTuple):
    """Results of one base pass over a skill."""

    means: np.ndarray
    """Mean final-norm state of each sampled document, float32 [n, D], in the order of the source, for novelty detection."""
    documents: np.ndarray
    """Numbers of these documents, [n], ascending."""
    statistics: FeatureStatistics
    """Statistics of the router's features, with the document mean mixed in, for new gate rows."""
    memory: np.ndarray
    """A random sample of the router's features, [m, D], with the document mean mixed in; document after document. In half
    precision (see `growth/library.py:half_precision`)."""
    features: FeatureCache | None
    """Final states of every segment on disk, before the document mean is mixed in. None if they are not kept."""


class BaseStates(NamedTuple):
    """Base states of a batch's N valid positions, in order."""

    batch: Batch
    final: np.ndarray
    """Final-norm states, float32 [N, D]."""
    features: np.ndarray
    """Router features, float32 [N, D]. The same array as `final` if router_layer is final."""


def base_states(
    model: RoutedDecoder, segments: Sequence[Segment], max_seq_length: int, batch_size: int
) -> Iterator[BaseStates]:
    """Yield the base's states over segments, batch by batch. They do not depend on how the segments are packed."""
    yield from iterate_states(model, evaluation_batches(segments, max_seq_length, batch_size))


def iterate_states(model: RoutedDecoder, batches: Sequence[Batch]) -> Iterator[BaseStates]:
    """Yield the base's states over batches.

    A few batches are computed at a time. Each rank computes its share, and all ranks get the states of every batch by
    all_gather.
    """

    def compute_states(batch: Batch) -> list[mx.array]:
        final, features = model.states_and_features(
            mx.array(batch.inputs), attention.attention_layout(batch.segment_ids, model.window)
        )
        return [states.astype(mx.float32) for states in ([final] if features is final else [final, features])]

    group = world()
    # A full chunk has at least one batch for every rank.
    size = max(CHUNK, group.world_size)
    chunks = range(0, len(batches), size)
    for begin in console.track(chunks, "  reading with the base", len(chunks)):
        group.raise_if_stop_requested("stopped before the skill was learned; nothing is lost, go on with --resume")
        chunk = batches[begin : begin + size]
        local_batches = group.shard(chunk)
        results = streams.run_concurrently([partial(compute_states, batch) for batch in local_batches])
        valid_states = [
            [np.array(array)[b.segment_ids > 0] for array in arrays]
            for b, arrays in zip(local_batches, results, strict=True)
        ]
        if group.world_size > 1:
            shape = (1 if model.router_layer == "final" else 2, model.base.args.hidden_size)
            valid_states = _gather_states(chunk, valid_states, shape)
        for batch, arrays in zip(chunk, valid_states, strict=True):
            yield BaseStates(batch, arrays[0], arrays[-1])


def _gather_states(
    batches: Sequence[Batch], local_states: list[list[np.ndarray]], shape: tuple[int, int]
) -> list[list[np.ndarray]]:
    """Gather the states of all batches from the ranks.

    Args:
        batches: all batches of the chunk. Batch i belongs to rank i % world_size.
        local_states: arrays of each of this rank's batches, one or two of them, [N, D].
        shape: the number of arrays per batch, and D.
    """
    group = world()
    counts = [int((batch.segment_ids > 0).sum()) for batch in batches]
    # A rank without a batch contributes no rows, which still need the right width.
    empty = np.zeros((0, shape[0] * shape[1]), np.float32)
    rows = np.concatenate([empty, *(np.concatenate(states, axis=1) for states in local_states)])
    gathered = group.all_gather(rows, [sum(counts[rank :: group.world_size]) for rank in range(group.world_size)])
    result: list[list[np.ndarray]] = [[] for _ in batches]
    for rank, rank_rows in enumerate(gathered):
        indices = range(rank, len(batches), group.world_size)
        ends = np.cumsum([counts[index] for index in indices])[:-1]
        for index, valid_rows in zip(indices, np.split(rank_rows, ends) if indices else [], strict=True):
            result[index] = np.split(valid_rows, shape[0], axis=1)
    return result


def document_means(
    model: RoutedDecoder, segments: Sequence[Segment], documents: int, max_seq_length: int, batch_size: int
) -> np.ndarray:
    """Return the base's mean final state of each document, float64 [documents, D]. Segments number them from 0."""
    means = DocumentMeans(np.arange(documents), model.base.args.hidden_size)
    for states in base_states(model, segments, max_seq_length, batch_size):
        for index, rows in rows_by_segment(states.batch, segments):
            means.add(segments[index].document, states.final[rows])
    return means.means()


class RowSample:
    """Random sample of rows from the concatenated rows of all segments, document after document in random order.

    A cut through the sample divides documents, not only tokens: the router's fit holds out the end. The rows are drawn
    in advance, so the sample does not depend on the order in which segments arrive.
    """

    def __init__(self, segments: Sequence[Segment], dims: int, count: int, rng: np.random.Generator):
        positions = [segment.positions for segment in segments]
        self._starts = np.cumsum([0, *positions])
        self._row_ids = np.sort(rng.permutation(self._starts[-1])[:count])
        documents = np.array([segment.document for segment in segments])
        numbers, index = np.unique(documents, return_inverse=True)
        rank = rng.permutation(len(numbers))[index.reshape(-1)]
        # `_row_ids` is sorted, so that `add` finds a segment's rows by binary search. `_place` is where each row goes.
        order = np.argsort(np.repeat(rank, positions)[self._row_ids], kind="stable")
        self._place = np.empty_like(order)
        self._place[order] = np.arange(len(order))
        self.rows = np.zeros((len(order), dims), np.float32)

    def add(self, index: int, rows: np.ndarray) -> None:
        """Copy the sampled rows of one segment, given all its rows [positions, D]."""
        start = self._starts[index]
        low, high = np.searchsorted(self._row_ids, [start, start + len(rows)])
        self.rows[self._place[low:high]] = rows[self._row_ids[low:high] - start]


def run_base_pass(model: RoutedDecoder, skill: Skill, config: Config, features_path: Path | None = None) -> BasePass:
    """Run the base over a skill's training documents.

    All documents are read, or a random sample of growth.embedding_samples if their features would exceed
    data.feature_cache_mb. Raises UserError for states that are not finite.

    Args:
        model: the decoder. Its experts are not used.
        skill: the skill to read.
        config: the run's configuration.
        features_path: file for the feature cache. It is written only if all documents are read and the router reads the
            final states. By default no features are kept.
    """
    growth, dims = config.growth, model.base.args.hidden_size
    # One generator serves all draws below, so their order determines the run's random numbers.
    rng = _skill_generator(config.seed, skill.name)
    segments, all_read = _segments_to_read(skill, config, dims, rng)
    documents = np.unique([segment.document for segment in segments])
    # In the order of the source, so that the two halves are like two shards of it.
    sampled = np.sort(embedding.sample_documents(documents, growth.embedding_samples, growth.batch_samples, rng))
    means = DocumentMeans(sampled, dims)
    accumulator, memory = StatisticsAccumulator(dims), RowSample(segments, dims, config.training.memory_tokens, rng)
    writer = (
        FeatureWriter(features_path, segments, dims)
        if features_path and all_read and model.router_layer == "final"
        else None
    )
    # States that are not finite raise a UserError below. NumPy need not warn of them.
    with np.errstate(invalid="ignore"), writer or nullcontext():
        for states in base_states(model, segments, config.data.max_seq_length, config.training.batch_size):
            features = document_mean.mix_document_mean_packed(
                states.features, states.batch.segment_ids, model.document_mean
            )
            accumulator.add(features)
            for index, rows in rows_by_segment(states.batch, segments):
                means.add(segments[index].document, states.final[rows])
                memory.add(index, features[rows])
            if writer:
                writer.add(states.batch, states.features)
    feature_cache = _finish_features(writer, skill.name)
    remembered = half_precision(memory.rows)
    result = BasePass(means.means().astype(np.float32), sampled, accumulator.statistics(), remembered, feature_cache)
    if not (np.isfinite(result.means).all() and np.isfinite(result.statistics.total).all()):
        raise UserError(f"skill '{skill.name}': the base's states are not finite; use --model.dtype float32")
    return result


def segments_to_read(skill: Skill, config: Config, dims: int) -> tuple[list[Segment], bool]:
    """Return the training segments that a base pass reads, and whether these are all of them. Only then can their
    features be cached."""
    return _segments_to_read(skill, config, dims, _skill_generator(config.seed, skill.name))


def _segments_to_read(skill: Skill, config: Config, dims: int, rng: np.random.Generator) -> tuple[list[Segment], bool]:
    segments = skill.train.segments
    if skill.train.num_tokens * dims * BYTES_PER_VALUE <= config.data.feature_cache_mb << 20:
        return segments, True
    chosen = set(rng.permutation(skill.train.num_documents)[: config.growth.embedding_samples].tolist())
    return [segment for segment in segments if segment.document in chosen], False


def _skill_generator(seed: int, name: str) -> np.random.Generator:
    """Return a generator seeded by the run's seed and the skill's name (its first eight bytes), so that draws do not
    depend on the skill's place in the stream."""
    return generator(seed, SeedStream.BASE_PASS, int.from_bytes(name.encode()[:8].ljust(8, b"\0"), "big") >> 1)


def load_reference_statistics(base: Base, model: RoutedDecoder) -> Reference:
    """Load the reference statistics of a base from the cache, or compute them; rank 0 then caches them for the next run.

    They are the statistics of the packaged reference text (`assets.reference_text`), the same for every base.
    """
    texts = assets.reference_text()
    text_digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dylora_mlx"
    cached = cache_folder / f"reference-{base.fingerprint[:32]}-{text_digest[:8]}.safetensors"
    # The base pass below is collective: if one rank lacks the file, all ranks must compute.
    if not world().any_rank(not cached.is_file()):
        return embedding.load_reference(cached, base.args.hidden_size)
    reference = embedding.compute_reference(text_means(texts, base, model, REFERENCE_LENGTH, REFERENCE_ROWS))
    if not is_main_process():
        return reference
    try:
        embedding.save_reference(reference, cached)
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError if it cannot write.
        cached.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        console.warn(f"{cached}: the reference could not be kept ({reason}); it is computed again next time")
    return reference


def text_means(texts: Sequence[str], base: Base, model: RoutedDecoder, length: int, rows: int) -> np.ndarray:
    """Return the base's mean final state of each text, float64 [n, D], read in rows of `length` positions, `rows` at a time."""
    segments = text_segments(texts, base, length)
    return document_means(model, segments, 1 + segments[-1].document, length, rows)


def text_segments(texts: Sequence[str], base: Base, length: int) -> list[Segment]:
    """Return plain texts as tokenized documents, cut into segments of at most `length` positions."""
    source = Source(name="text", source="text", text="{text}")
    records = (Record({"text": text}, f"text {number}") for number, text in enumerate(texts, 1))
    encoded = formatting.collect(formatting.encode_records(records, source, base.tokenizer))
    return packing.split_documents(encoded.documents, length)


def rows_by_segment(batch: Batch, segments: Sequence[Segment]) -> Iterator[tuple[int, slice]]:
    """Yield each segment's index and the slice of its rows among the batch's valid positions."""
    start = 0
    for index in (i for row in batch.rows for i in row):
        end = start + segments[index].positions
        yield index, slice(start, end)
        start = end


def _finish_features(writer: FeatureWriter | None, name: str) -> FeatureCache | None:
    """Close the writer and return the feature cache. Warns and returns None if the features could not be kept."""
    if writer is None:
        return None
    features = writer.finish()
    if features is None:
        console.warn(f"{name}: features are computed again at every step, they could not be kept ({writer.failure})")
    return features
