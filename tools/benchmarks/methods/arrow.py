"""Arrow: experts that were trained apart are routed by their own weights, without any training.

Ostapenko et al. 2024, "Towards Modular LLMs by Building and Reusing a Library of LoRAs", section on Arrow routing: in each
layer the prototype of an expert is the direction of the input that its update magnifies most, the top right singular
vector; a token's logits are |x . v_e|, its gates the softmax over the k largest.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import mlx.core as mx
import numpy as np

from dylora_mlx.errors import UserError
from dylora_mlx.model.decoder import block
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts.lora import Expert, ExpertGates, LoRAFactors, Stack
from dylora_mlx.model.routing import router
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.training.step.losses import MicroBatch, batch_layout
from methods import adapters, training
from methods.apart import Apart
from methods.bench import Bench, Result
from methods.course import Course
from methods.training import Forward

SHARED = ("q_proj", "k_proj", "v_proj")
"""Projections of one block that read the same input."""


def arrow(bench: Bench, experts: Apart) -> Result:
    """After each skill only the experts that exist by then take part. Gates are each layer's own, so there is no one
    expert that a token is routed to. Raises UserError for projections that have no input in common."""
    check(bench.config.model.projections)
    course, top_k = Course(bench), bench.config.growth.top_k
    for now in experts.after:
        course.measure(routed(course.model, list(now.values()), top_k))
    last = routed(course.model, list(experts.after[-1].values()), top_k)
    spent = experts.course
    course.steps, course.tokens, course.clock = spent.steps, spent.tokens, spent.clock
    return course.result(training.losses(bench, last, "test"), experts.parameters)


def check(projections: Collection[str]) -> None:
    alone = [name for name in projections if name not in SHARED]
    if alone:
        raise UserError(
            f"model.projections: Arrow needs experts on one input of a block ({', '.join(SHARED)}), not on {', '.join(alone)}"
        )


def prototype(parts: Sequence[LoRAFactors]) -> np.ndarray:
    """Unit vector float64 [inputs] that updates with one input, side by side along their outputs, magnify most.

    With all A side by side = Q R and each B_p^T = Q_p R_p, the update Q (R blockdiag(R_p^T)) blockdiag(Q_p)^T has Q times
    the left singular vectors of a matrix no larger than [sum of ranks, sum of ranks].
    """
    q, r = np.linalg.qr(np.concatenate([_double(part.lora_a) for part in parts], axis=1))
    cores = [np.linalg.qr(_double(part.lora_b).T)[1].T for part in parts]
    expert_ids, begin = [], 0
    for core in cores:
        expert_ids.append(r[:, begin : begin + len(core)] @ core)
        begin += len(core)
    left, _, _ = np.linalg.svd(np.concatenate(expert_ids, axis=1))
    return q @ left[:, 0]


def _double(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def prototypes(experts: Sequence[Expert]) -> dict[int, mx.array]:
    """Of every layer that carries experts, float32 [E, inputs]."""
    layers = [layer for layer, named in enumerate(experts[0].layers) if named]
    found = {layer: np.stack([prototype(list(e.layers[layer].values())) for e in experts]) for layer in layers}
    return {layer: mx.array(rows.astype(np.float32)) for layer, rows in found.items()}


def gates(x: mx.array, rows: mx.array, top_k: int) -> mx.array:
    """Gates [B, L, E], float32, of a layer's input [B, L, inputs] and its prototypes [E, inputs]."""
    return router.gates(mx.abs(x.astype(mx.float32) @ rows.T), Routing(top_k, mx.array(1.0)))


def routed(model: RoutedDecoder, experts: Sequence[Expert], top_k: int) -> Forward:
    """The base with these experts, gated in every layer by what the layer reads."""
    stack, rows = adapters.stacked(model, experts), prototypes(experts)
    return lambda batch: _states(model, batch, stack, rows, top_k)


def _states(model: RoutedDecoder, batch: MicroBatch, stack: Stack, rows: dict[int, mx.array], top_k: int) -> mx.array:
    where, h = batch_layout(batch, model.window), model.embed(batch.inputs)
    for i, layer in enumerate(model.base.model.layers):
        factors, known = stack.layers.get(i, {}), None
        if factors:
            # Column 0 of the spread is the base's, which takes no part.
            found = gates(layer.input_layernorm(h), rows[i], top_k)
            known = ExpertGates((found @ stack.rank_scale[1:]).astype(h.dtype))
        h = block.run_block(model.family, layer, h, where, model.is_global(i), None, factors, known)
    return model.base.model.norm(h)
