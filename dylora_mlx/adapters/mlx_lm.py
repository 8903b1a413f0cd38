"""Convert an expert to and from an mlx-lm adapter: the same factors under mlx-lm's names."""

from __future__ import annotations

import mlx.core as mx

from dylora_mlx.config import ATTENTION
from dylora_mlx.errors import UserError
from dylora_mlx.model.experts.lora import Expert, Shapes
from dylora_mlx.model.experts.offload import FactorNames


def module_key(projection: str) -> str:
    """Return a projection's path within its block, for example self_attn.q_proj: mlx-lm's `keys` of LoRA layers."""
    return f"{'self_attn' if projection in ATTENTION else 'mlp'}.{projection}"


def module_path(layer: int, projection: str) -> str:
    """Return a projection's path as mlx-lm and transformers name it, for example model.layers.3.self_attn.q_proj."""
    return f"model.layers.{layer}.{module_key(projection)}"


def weights(expert: Expert) -> dict[str, mx.array]:
    """Return {model.layers.N.X.lora_a: [inputs, r], ...lora_b: [r, outputs]}, float32."""
    arrays = {}
    for layer, projections in enumerate(expert.layers):
        for name, factors in projections.items():
            arrays[f"{module_path(layer, name)}.lora_a"] = factors.lora_a
            arrays[f"{module_path(layer, name)}.lora_b"] = factors.lora_b
    return arrays


def factor_names(shapes: Shapes) -> FactorNames:
    """Return the array names (a, b), by layer and projection, of an expert of these shapes."""
    return {
        layer: {name: (f"{module_path(layer, name)}.lora_a", f"{module_path(layer, name)}.lora_b") for name in named}
        for layer, named in shapes.items()
    }


def config(expert: Expert, base: str) -> dict:
    """Return adapter_config.json for `mlx_lm.generate --adapter-path`. Experts are on the last `num_layers` layers."""
    names = sorted({name for projections in expert.layers for name in projections})
    return {
        "fine_tune_type": "lora",
        "model": base,
        "num_layers": sum(map(bool, expert.layers)),
        "lora_parameters": {
            "rank": expert.rank,
            "scale": expert.scale,
            "dropout": 0.0,
            "keys": [module_key(name) for name in names],
        },
    }


def check_rank(arrays: dict[str, mx.array], rank: int) -> None:
    """Raise UserError unless all factors have this rank. Call it before allocating an expert of that size."""
    for name, value in arrays.items():
        if value.ndim != 2 or value.shape[1 if name.endswith("lora_a") else 0] != rank:
            raise UserError(f"adapter weight '{name}' has shape {value.shape}, which is not of rank {rank}")


def load_weights(expert: Expert, arrays: dict[str, mx.array]) -> None:
    """Load an adapter's weights into an expert of the same shapes.

    Raises UserError for a weight that is missing, unknown, of another shape or not finite.
    """
    expected = weights(expert)
    for name in expected.keys() ^ arrays.keys():
        raise UserError(f"adapter weight '{name}' is {'missing' if name in expected else 'not part of this expert'}")
    for layer, projections in enumerate(expert.layers):
        for name, factors in projections.items():
            for part in ("lora_a", "lora_b"):
                value = arrays[f"{module_path(layer, name)}.{part}"]
                if value.shape != factors[part].shape:
                    raise UserError(
                        f"{module_path(layer, name)}.{part}: shape {value.shape}, not {factors[part].shape}"
                    )
                if not mx.issubdtype(value.dtype, mx.floating) or not mx.isfinite(value).all().item():
                    raise UserError(f"{module_path(layer, name)}.{part}: not finite numbers")
                factors[part] = value
