"""How experts are put together: at every layer, or only in the final logits.

At every layer the updates of all experts are summed under the gates (`lora.Mixture`, the default): experts compose, in one
pass. In the logits each expert is a model of its own and the gates mix what these predict, as the earlier attempt did: a
pass for each expert, for comparison. The head is linear, so mixing final-norm states mixes the logits.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from dylora_mlx.model.experts.lora import Mixture, Stack

Pass = Callable[[Mixture | None], mx.array]
"""Final-norm states [B, L, D] under a mixture, None for the base alone."""


def at_every_layer(run: Pass, stack: Stack, gates: mx.array, top_k: int | None, dtype: mx.Dtype) -> mx.array:
    """States [B, L, D] of one pass under gates [B, L, E], at most top_k of which are not zero."""
    return run(stack.under(gates, top_k, dtype))


def in_the_logits(run: Pass, stack: Stack, gates: mx.array, _: int | None, dtype: mx.Dtype) -> mx.array:
    """States sum_e g_e h_e [B, L, D], h_e of a pass with expert e alone; the base is column 0."""
    columns = gates.shape[-1]
    mixed = gates[..., :1].astype(dtype) * run(None)
    for column in range(1, columns):
        alone = mx.broadcast_to((mx.arange(columns) == column).astype(gates.dtype), gates.shape)
        states = run(stack.under(alone, 1, dtype))
        mixed = mixed + gates[..., column : column + 1].astype(dtype) * states
    return mixed


COMPOSITIONS = {"layers": at_every_layer, "logits": in_the_logits}
