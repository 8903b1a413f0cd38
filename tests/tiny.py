"""A random Gemma 3 of four layers, small enough to check the mathematics token by token, with pools and batches for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.gemma3_text import Model, ModelArgs

from dylora_mlx.data import packing
from dylora_mlx.data.encoding import Document
from dylora_mlx.data.packing import Batch, Segment
from dylora_mlx.growth.pool import ExpertRecord, Pool
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.attention import AttentionMasks, packed_masks
from dylora_mlx.model.decoder.decode_cache import DecoderCache
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.training.step.losses import MicroBatch, RehearsalBatch, micro_batch

ARGS = ModelArgs(
    model_type="gemma3_text", hidden_size=64, num_hidden_layers=4, intermediate_size=96, num_attention_heads=4,
    head_dim=24, vocab_size=90, num_key_value_heads=2, query_pre_attn_scalar=24, sliding_window=8,
    sliding_window_pattern=2,
)  # fmt: skip
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DENSE = Routing(None, mx.array(1.0))


@cache
def tiny_base(layers: int = ARGS.num_hidden_layers) -> Base:
    """Return the tiny base: sliding window 8, every second layer global, two key-value heads, untied head, seeded random weights."""
    rng = np.random.default_rng(7)

    def random_array(name: str, value: mx.array) -> mx.array:
        return mx.array(rng.normal(0, 0.3 if "norm" in name else 0.2, value.shape).astype(np.float32))

    model = Model(replace(ARGS, num_hidden_layers=layers))
    model.update(tree_map_with_path(random_array, model.parameters()))
    model.freeze()
    model.eval()
    return Base(model, None, "tiny", Path("."), "0" * 64)


def quantised_base(bits: int = 4) -> Base:
    """Return a quantised copy of the tiny base."""
    model = Model(ARGS)
    model.update(tiny_base().model.parameters())
    nn.quantize(model, group_size=32, bits=bits)
    model.freeze()
    return replace(tiny_base(), model=model)


def tiny_pool(
    ranks: Sequence[int] = (),
    router_layer: int | str = "final",
    projections: Sequence[str] = ("q_proj", "v_proj"),
    filled: bool = True,
    grad_checkpoint: bool = False,
    seed: int = 0,
    layers: int = ARGS.num_hidden_layers,
) -> Pool:
    """Return a pool on the tiny base with experts of these ranks. Unless `filled` is False, every B and gate row is random, not zero."""
    pool = Pool(RoutedDecoder(tiny_base(layers), list(projections), router_layer, grad_checkpoint))
    rng = np.random.default_rng(seed)
    for number, rank in enumerate(ranks):
        pool.add(ExpertRecord(f"skill_{number}", rank, 0.5 + number + rank, 0), mx.random.key(seed * 100 + number))
    if filled:
        for expert in pool.model.experts:
            for factors in (f for layer in expert.layers for f in layer.values()):
                factors.lora_b = mx.array(rng.normal(0, 0.2, factors.lora_b.shape).astype(np.float32))
        for row in pool.model.router.rows:
            row.weight = mx.array(rng.normal(0, 0.3, row.weight.shape).astype(np.float32))
            row.bias = mx.array(rng.normal(0, 0.3, 1).astype(np.float32))
    return pool


def rows_of(lengths: Sequence[Sequence[int]], width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return packed rows of random documents: tokens and segment ids, both int32 [B, width].

    Args:
        lengths: the lengths of the documents of each row; 0 leaves a gap of one position.
        width: positions in a row.
        seed: seed of the tokens.
    """
    rng = np.random.default_rng(seed)
    tokens, segments = np.zeros((len(lengths), width), np.int32), np.zeros((len(lengths), width), np.int32)
    for r, row in enumerate(lengths):
        start = 0
        for number, n in enumerate(row, 1):
            if n:
                tokens[r, start : start + n] = rng.integers(3, ARGS.vocab_size, n)
                segments[r, start : start + n] = number
            start += n or 1
    return tokens, segments


def pieces_of(lengths: Sequence[int], seed: int = 0, learned: float = 0.8) -> list[Segment]:
    """Return pieces of random documents that occupy these numbers of positions. `learned` is the share of tokens in the loss."""
    rng = np.random.default_rng(seed)
    documents = [
        Document(rng.integers(3, ARGS.vocab_size, n + 1).astype(np.int32), np.append(False, rng.random(n) < learned))
        for n in lengths
    ]
    return packing.split_documents(documents, max(lengths))


def batch_of(rows: Sequence[Sequence[int]], width: int, seed: int = 0, learned: float = 0.8) -> Batch:
    """Return a packed batch of random documents that occupy these numbers of positions."""
    pieces = pieces_of([n for row in rows for n in row], seed, learned)
    piece_ids = iter(range(len(pieces)))
    return packing.collate(pieces, [[next(piece_ids) for _ in row] for row in rows], width)


def documents_of(segments: np.ndarray) -> list[tuple[int, slice]]:
    """Return (row, span) of every document, row by row."""
    documents = []
    for r, row in enumerate(segments):
        for number in np.unique(row[row > 0]):
            positions = np.flatnonzero(row == number)
            documents.append((r, slice(int(positions[0]), int(positions[-1]) + 1)))
    return documents


def alone(length: int, batch: int = 1, window: int = ARGS.sliding_window) -> AttentionMasks:
    """Return attention masks of rows that hold one document each."""
    return packed_masks(mx.ones((batch, length), mx.int32), window)


def micro(
    lengths: Sequence[Sequence[int]], width: int, seed: int = 0, learned: float = 0.6, rows: slice = slice(None)
) -> MicroBatch:
    """Return a micro-batch of packed rows. A target is in the loss with probability `learned`; `rows` selects some of the rows."""
    tokens, segments = rows_of(lengths, width, seed)
    loss_mask = (np.random.default_rng(seed).random(tokens.shape) < learned) & (segments > 0)
    arrays = (a[rows] for a in (tokens, np.roll(tokens, -1, 1), loss_mask, segments))
    return micro_batch(*arrays, None, ARGS.sliding_window)


def remembered(expert_ids: Sequence[int] = (), each: int = 5, seed: int = 0) -> RehearsalBatch:
    """Return a rehearsal batch of random features, `each` per expert id; empty without expert ids."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(each * len(expert_ids), ARGS.hidden_size)).astype(np.float32)
    experts = np.repeat(np.array(expert_ids, np.int32), each)
    return RehearsalBatch(mx.array(features), mx.array(experts), mx.full(experts.shape, 1 / each))


def flat(tree: object) -> dict[str, np.ndarray]:
    """Return the arrays of a tree by name, copied to NumPy; None is left out."""
    return {name: np.array(value) for name, value in dict(tree_flatten(tree)).items() if value is not None}


def close(a: object, b: object, tolerance: float) -> bool:
    """Return whether two arrays agree to `tolerance`, absolute and relative."""
    return np.allclose(np.array(a), np.array(b), rtol=tolerance, atol=tolerance)


def column_gates(expert_id: int, expert_ids: int, batch: int, length: int) -> mx.array:
    """Return gates [B, L, E] that send every token to one expert."""
    return mx.broadcast_to((mx.arange(expert_ids) == expert_id).astype(mx.float32), (batch, length, expert_ids))


def decode_cache_of(model: RoutedDecoder, rows: int) -> DecoderCache:
    """Return empty caches of a batch of rows, as mlx-lm merges them."""
    layers = zip(*(model.make_cache() for _ in range(rows)), strict=True)
    return DecoderCache.of([type(caches[0]).merge(list(caches)) for caches in layers])
