"""Convert a mixture to a PEFT X-LoRA adapter (Buehler & Buehler 2024): the router becomes its classifier.

The experts become its adapters. The conversion is exact if the router reads the base's final states: X-LoRA runs the
base alone, applies one linear layer to its last hidden state, and scales every adapter per token with the result.
"""

from __future__ import annotations

import mlx.core as mx

from dylora_mlx.model.experts.lora import Expert, Shapes
from dylora_mlx.model.routing.router import Gate

CLASSIFIER = "base_model.internal_xlora_classifier.layers.0."
"""Prefix of the classifier's weights in PEFT."""


def classifier(gate: Gate, temperature: float, top_k: int | None) -> dict[str, mx.array]:
    """Return the classifier {...weight: [E, D], ...bias: [E]}, float32, with the temperature divided out.

    With a top_k, PEFT treats a logit of exactly 0.0 as one that was not selected. So if a row gives 0.0 for every
    token, all biases are raised until every row with zero weights is above zero. The gates stay the same.
    """
    weight, bias = gate.weight / temperature, gate.bias / temperature
    constant = mx.abs(weight).sum(-1) == 0
    if top_k is not None and mx.any(mx.logical_and(constant, bias == 0)).item():
        # Ignore rows with a bias so low that they are never selected: they must not determine the shift.
        near = mx.logical_and(constant, bias > -1e6)
        bias = bias + 1.0 + mx.max(mx.where(near, mx.abs(bias), 0.0))
    return {f"{CLASSIFIER}weight": mx.contiguous(weight), f"{CLASSIFIER}bias": mx.contiguous(bias)}


def config(dims: int, experts: int, top_k: int | None, base: str) -> dict:
    """Return adapter_config.json for a base with hidden size `dims` and `experts` adapters, the null expert's included.

    The adapters lie in folders 0, 1, ...; PEFT maps them to the classifier's outputs in this order.
    """
    return {
        "peft_type": "XLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "hidden_size": dims,
        "adapters": {str(expert_id): str(expert_id) for expert_id in range(experts)},
        "xlora_depth": 1,
        "xlora_dropout_p": 0.0,
        "layerwise_scalings": False,
        "enable_softmax": top_k is None,
        "enable_softmax_topk": top_k is not None,
        "top_k_lora": top_k,
        "softmax_temperature": 1.0,
        "scaling_pass_value": 0.0,
        "global_scaling_weight": 1.0,
        "use_trainable_adapters": False,
        "inference_mode": True,
    }


def null_expert(shapes: Shapes) -> Expert:
    """Return an adapter of rank 1 that changes nothing. PEFT needs one for the null expert's gate."""
    expert = Expert(shapes, 1, 1.0, mx.random.key(0))
    for projections in expert.layers:
        for factors in projections.values():
            factors.lora_a = mx.zeros_like(factors.lora_a)
    return expert
