"""Arrow: solo experts are routed by their own weights, without any training of a router.

Ostapenko et al. 2024, "Towards Modular LLMs by Building and Reusing a Library of LoRAs", section on Arrow routing. In
each layer, the prototype v_e of an expert is the direction of the input that its update magnifies most: the top right
singular vector. A token's logits are |x . v_e|, and its gates the softmax over the k largest.
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
from methods.apart import SoloExperts
from methods.bench import Bench, Result
from methods.course import Course
from methods.training import Forward

SHARED = ("q_proj", "k_proj", "v_proj")
"""Projections of one block that read the same input."""


def arrow(bench: Bench, experts: SoloExperts) -> Result:
    """Evaluate Arrow routing over solo experts; after each skill, only the experts that exist by then take part.

    Each layer has its own gates, so a token has no single expert, and the result has no routing accuracy. Raises
    UserError if the adapted projections do not share an input.
    """
    check(bench.config.model.projection_names)
    course, top_k = Course(bench), bench.config.growth.top_k
    for experts_by_owner in experts.after:
        course.measure(routed(course.model, list(experts_by_owner.values()), top_k))
    last = routed(course.model, list(experts.after[-1].values()), top_k)
    training_course = experts.course
    course.steps, course.tokens, course.clock = training_course.steps, training_course.tokens, training_course.clock
    return course.result(training.losses(bench, last, "test"), experts.parameters)


def unsupported(projections: Collection[str]) -> list[str]:
    """Return those projections that do not read the input which Arrow's gates read."""
    return [name for name in projections if name not in SHARED]


def check(projections: Collection[str]) -> None:
    """Raise UserError if the adapted projections do not share an input."""
    if others := unsupported(projections):
        raise UserError(
            f"model.projections: Arrow needs experts on one input of a block ({', '.join(SHARED)}), not on {', '.join(others)}"
        )


def prototype(parts: Sequence[LoRAFactors]) -> np.ndarray:
    """Return the input direction that the updates magnify most, a unit vector float64 [inputs].

    The updates share one input and are concatenated along their outputs. Let all A side by side be Q R, and each B_p^T
    = Q_p R_p. Then the update is Q (R blockdiag(R_p^T)) blockdiag(Q_p)^T, and its left singular vectors are Q times
    those of the inner matrix, which is no larger than [sum of ranks, sum of ranks].
    """
    q, r = np.linalg.qr(np.concatenate([_double(part.lora_a) for part in parts], axis=1))
    cores = [np.linalg.qr(_double(part.lora_b).T)[1].T for part in parts]
    products, offset = [], 0
    for core in cores:
        products.append(r[:, offset : offset + len(core)] @ core)
        offset += len(core)
    left, _, _ = np.linalg.svd(np.concatenate(products, axis=1))
    return q @ left[:, 0]


def _double(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def prototypes(experts: Sequence[Expert]) -> dict[int, mx.array]:
    """Return the prototypes float32 [E, inputs] of every layer that has experts."""
    layers = [layer for layer, named in enumerate(experts[0].layers) if named]
    by_layer = {layer: np.stack([prototype(list(e.layers[layer].values())) for e in experts]) for layer in layers}
    return {layer: mx.array(rows.astype(np.float32)) for layer, rows in by_layer.items()}


def gates(x: mx.array, rows: mx.array, top_k: int) -> mx.array:
    """Return float32 gates [B, L, E] from a layer's input [B, L, inputs] and its prototypes [E, inputs].

    The absolute value of the projection is used, since the sign of a singular vector is arbitrary.
    """
    return router.gates(mx.abs(x.astype(mx.float32) @ rows.T), Routing(top_k, mx.array(1.0)))


def routed(model: RoutedDecoder, experts: Sequence[Expert], top_k: int) -> Forward:
    """Return the forward pass of the base with these experts, gated in each layer by the layer's input."""
    stack, rows = adapters.stacked(model, experts), prototypes(experts)
    return lambda batch: _states(model, batch, stack, rows, top_k)


def _states(model: RoutedDecoder, batch: MicroBatch, stack: Stack, rows: dict[int, mx.array], top_k: int) -> mx.array:
    attn_layout, h = batch_layout(batch, model.window), model.embed(batch.inputs)
    for i, layer in enumerate(model.base.model.layers):
        factors, gated_experts = stack.layers.get(i, {}), None
        if factors:
            # Row 0 of rank_scale is the null expert's, which takes no part here.
            layer_gates = gates(layer.input_layernorm(h), rows[i], top_k)
            gated_experts = ExpertGates((layer_gates @ stack.rank_scale[1:]).astype(h.dtype))
        h = block.run_block(model.family, layer, h, attn_layout, model.is_global(i), None, factors, gated_experts)
    return model.base.model.norm(h)
