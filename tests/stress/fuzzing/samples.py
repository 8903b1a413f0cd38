"""Small valid objects from which seed files are written: a base with random weights, experts, a pool, a library."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import mlx.core as mx
import numpy as np
from mlx_lm.models.gemma3_text import Model, ModelArgs

from dylora_mlx.growth.feature_statistics import FeatureStatistics
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.growth.pool import ExpertRecord, Pool
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts.lora import Expert, Shapes

DIMS = 8
SHAPES: Shapes = {0: {"q_proj": (DIMS, 4), "v_proj": (DIMS, 4)}}
ARGS = ModelArgs(
    model_type="gemma3_text", hidden_size=DIMS, num_hidden_layers=1, intermediate_size=8, num_attention_heads=1, head_dim=4,
    vocab_size=16, num_key_value_heads=1, query_pre_attn_scalar=4, sliding_window=8, sliding_window_pattern=2,
)  # fmt: skip


def expert(rank: int = 2, seed: int = 0) -> Expert:
    """Return an expert with a random B, so that its update is not zero."""
    expert_ = Expert(SHAPES, rank, 2.0 * rank, mx.random.key(seed))
    rng = np.random.default_rng(seed)
    for factors in expert_.layers[0].values():
        factors.lora_b = mx.array(rng.normal(size=factors.lora_b.shape).astype(np.float32))
    return expert_


@cache
def base() -> Base:
    """Return a base of one layer with random weights, without a tokenizer."""
    model = Model(ARGS)
    model.freeze()
    mx.eval(model.parameters())
    return Base(model, None, "tiny", Path("."), "0" * 64)


def empty_pool() -> Pool:
    """Return a pool without experts on that base."""
    return Pool(RoutedDecoder(base(), ["q_proj", "v_proj"], "final"))


def pool() -> Pool:
    """Return a pool of two experts: the first frozen, the second with q_proj frozen."""
    pool_ = empty_pool()
    for number, rank in enumerate((2, 1)):
        pool_.add(ExpertRecord(f"skill_{number}", rank, 4.0, 3 * number), mx.random.key(number))
    pool_.freeze(1)
    pool_.freeze_projections(2, ["q_proj"])
    return pool_


def library() -> Library:
    """Return a library of two skills, one of which arrived twice."""
    rng = np.random.default_rng(0)
    library_ = Library("0" * 64)
    for number, name in enumerate(("python", "skill_0")):
        features = rng.normal(size=(6, DIMS)).astype(np.float32)
        library_.add(LibraryEntry(name, number, features[:3], FeatureStatistics.from_features(features), features))
    library_.entries[1].record_arrival(rng.normal(size=(2, DIMS)).astype(np.float32), 0.5)
    return library_
