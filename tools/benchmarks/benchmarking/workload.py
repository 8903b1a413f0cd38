"""Sizes of models, and documents whose lengths are distributed as real ones are; their tokens are random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

GEMMA3_270M = {
    "model_type": "gemma3_text", "hidden_size": 640, "num_hidden_layers": 18, "intermediate_size": 2048,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256,
    "vocab_size": 262144, "sliding_window": 512, "sliding_window_pattern": 6, "rope_theta": 1e6,
    "rope_local_base_freq": 1e4, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768,
}  # fmt: skip
"""google/gemma-3-270m's config.json."""

# Deciles of positions a document, from the shortest to the longest, in the embedded base's tokens, and the share of them
# that is learned: the training splits of the packaged skills requests, flask, stripe and sql, and of MBPP as the preset
# of that name formats it (its prompts are not learned).
DECILES = {
    "snippets": ([62, 95, 108, 115, 122, 128, 134, 142, 153, 171, 259], 1.0),
    "mbpp": ([35, 57, 65, 71, 78, 84, 97, 109, 132, 177, 385], 0.76),
}


@dataclass(frozen=True)
class Workload:
    """One thing to run: `rows` rows of `length` positions a step, documents by `lengths` (full: one a row); or `tokens`
    generated after a prompt of `prompt`. top_k: experts a token in a step, None for all; gather_threshold: see the model's;
    memory_mb: for frozen experts, which stand in files then."""

    size: str = "gemma3-270m"
    lengths: str = "full"
    rows: int = 2
    length: int = 512
    experts: int = 1
    rank: int = 8
    alpha: float = 16.0
    seed: int = 0
    prompt: int = 64
    tokens: int = 128
    top_k: int | None = None
    gather_threshold: float | None = None
    memory_mb: int | None = None


def arguments(size: str) -> dict[str, Any]:
    """The architecture of a size, as config.json has it."""
    if size == "gemma3-270m":
        return dict(GEMMA3_270M)
    import json

    from dylora_mlx import assets

    return json.loads((assets.BASE / "config.json").read_text(encoding="utf-8"))


def documents(workload: Workload, count: int) -> list[tuple[np.ndarray, int]]:
    """(tokens int32 [n + 1], prompt tokens that are not learned) of `count` documents of n positions."""
    rng = np.random.default_rng(workload.seed)
    vocabulary = arguments(workload.size)["vocab_size"]
    if workload.lengths == "full":
        drawn, learned = np.full(count, workload.length), 1.0
    else:
        deciles, learned = DECILES[workload.lengths]
        drawn = np.interp(rng.random(count), np.linspace(0, 1, 11), deciles).astype(int)
    return [(rng.integers(3, vocabulary, n + 1).astype(np.int32), round((1 - learned) * n)) for n in drawn]
