"""Model sizes, and documents of random tokens whose lengths follow the distribution of real data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dylora_mlx.config import ModelConfig

GEMMA3_270M = {
    "model_type": "gemma3_text", "hidden_size": 640, "num_hidden_layers": 18, "intermediate_size": 2048,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256,
    "vocab_size": 262144, "sliding_window": 512, "sliding_window_pattern": 6, "rope_theta": 1e6,
    "rope_local_base_freq": 1e4, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768,
}  # fmt: skip
"""google/gemma-3-270m's config.json."""

DECILES = {
    "snippets": ([62, 95, 108, 115, 122, 128, 134, 142, 153, 171, 259], 1.0),
    "mbpp": ([35, 57, 65, 71, 78, 84, 97, 109, 132, 177, 385], 0.76),
}
"""Deciles of the positions per document, shortest to longest, and the share of positions with a loss, by kind of data.

Measured with the embedded base's tokenizer on training splits: `snippets` on the packaged skills requests, flask,
stripe and sql; `mbpp` on MBPP as the preset of that name formats it, whose prompts are masked from the loss.
"""


@dataclass(frozen=True)
class Workload:
    """Settings of one benchmark: training steps on packed rows, or decoding after a prompt."""

    size: str = "gemma3-270m"
    lengths: str = "full"
    """Distribution of document lengths: "full" (one document per row), or a key of DECILES."""
    rows: int = 2
    """Rows per step (batch size)."""
    length: int = 512
    """Positions per row (sequence length)."""
    experts: int = 1
    rank: int = 8
    alpha: float = 16.0
    projections: tuple[str, ...] = tuple(ModelConfig().projection_names)
    """Linear layers that carry LoRA factors; the default is the product's."""
    seed: int = 0
    prompt: int = 64
    """Decoding: tokens of the prompt."""
    tokens: int = 128
    """Decoding: tokens to generate."""
    top_k: int | None = None
    """Experts per token in a training step; None for all."""
    gather_threshold: float | None = None
    """Experts per used expert above which experts are gathered; None for the model's default."""
    memory_mb: int | None = None
    """Memory for frozen experts, which are then offloaded to files; None keeps all in memory."""


def arguments(size: str) -> dict[str, Any]:
    """Return the architecture of a model size, as in config.json."""
    if size == "gemma3-270m":
        return dict(GEMMA3_270M)
    import json

    from dylora_mlx import assets

    return json.loads((assets.BASE / "config.json").read_text(encoding="utf-8"))


def projection_shapes(workload: Workload) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of each projection that carries LoRA factors."""
    a = arguments(workload.size)
    hidden, inner = a["hidden_size"], a["intermediate_size"]
    queries, keys = (a[name] * a["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    shapes = {
        "q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys), "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden),
    }  # fmt: skip
    return {name: shapes[name] for name in workload.projections}


def documents(workload: Workload, count: int) -> list[tuple[np.ndarray, int]]:
    """Return `count` documents of random tokens: (tokens int32 [n + 1], number of prompt tokens without a loss) each.

    A document has n positions, drawn from the workload's distribution of lengths.
    """
    rng = np.random.default_rng(workload.seed)
    vocabulary = arguments(workload.size)["vocab_size"]
    if workload.lengths == "full":
        lengths, loss_share = np.full(count, workload.length), 1.0
    else:
        deciles, loss_share = DECILES[workload.lengths]
        lengths = np.interp(rng.random(count), np.linspace(0, 1, 11), deciles).astype(int)
    return [
        (rng.integers(3, vocabulary, length + 1).astype(np.int32), round((1 - loss_share) * length))
        for length in lengths
    ]
