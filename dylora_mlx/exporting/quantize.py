"""Quantise a full model with mlx-lm's own functions: the files are those of `mlx_lm.convert -q` on the float model."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.utils import make_shards, quantize_model

from dylora_mlx.errors import UserError
from dylora_mlx.exporting.folder import FolderContent
from dylora_mlx.exporting.formats import Export
from dylora_mlx.model.base.load import Base


class Quantization(NamedTuple):
    """How a model is quantised, in mlx's affine mode. The defaults are those of mlx-lm."""

    bits: int = 4
    """Bits of a weight. A recipe chooses them instead."""
    group_size: int = 64
    """Weights that share a scale and a bias."""
    recipe: str | None = None
    """One of mlx-lm's mixed recipes, such as mixed_4_6: more bits for the layers and projections that need them."""


class QuantizedModel(NamedTuple):
    """A quantised full model before it is written."""

    export: Export
    """Its files and manifest."""
    model: nn.Module
    """mlx-lm's model of these files."""


def check_quantization(quantization: Quantization) -> None:
    """Raise UserError for bits or a group size that this version of mlx does not have."""
    for option, value in (("--q-bits", quantization.bits), ("--q-group-size", quantization.group_size)):
        if not 0 < value < 2**15:  # mlx divides by it before it looks at it
            raise UserError(f"{option} {value}: mlx has no such quantisation; leave it out for mlx-lm's default")
    try:
        mx.quantize(mx.zeros((1, 32 * quantization.group_size)), quantization.group_size, quantization.bits)
    except ValueError as error:  # mlx names the values that it has
        reason = str(error).removeprefix("[quantize] ")
        option = "--q-group-size" if "group size" in reason else "--q-bits"
        raise UserError(f"{option}: {reason}") from error


def float_weights(export: Export) -> dict[str, mx.array]:
    """Return all weights of an exported full model by name. They are lazy: read from disk and summed when used."""
    arrays: dict[str, mx.array] = {}
    for name, value in export.content.items():
        if name.endswith(".safetensors"):
            loaded: Any = value() if callable(value) else value
            arrays |= loaded
    return arrays


def build_model(base: Base, weights: Mapping[str, mx.array]) -> Any:
    """Return mlx-lm's model of the base's architecture with these float weights."""
    model = type(base.model)(base.args)
    sanitize = getattr(model, "sanitize", lambda arrays: arrays)
    model.load_weights(list(sanitize(dict(weights)).items()))
    model.eval()
    return model


def quantize_export(base: Base, export: Export, quantization: Quantization) -> QuantizedModel:
    """Quantise an exported full model: every linear layer and the embedding, as mlx-lm does.

    Args:
        base: the base, for the model's architecture.
        export: the float model, whose weights are rounded to their stored dtype before they are quantised.
        quantization: bits and group size, or a recipe.

    Raises UserError for a layer whose width is not divisible by the group size.
    """
    model = build_model(base, float_weights(export))
    _check_widths(model, quantization.group_size)
    predicate: Any = None
    if quantization.recipe is not None:
        predicate = mixed_quant_predicate_builder(quantization.recipe, model, quantization.group_size)
    with redirect_stdout(io.StringIO()):  # mlx-lm prints the bits per weight
        model, config = quantize_model(
            model, export.content["config.json"], quantization.group_size, quantization.bits, quant_predicate=predicate
        )
    weights = dict(tree_flatten(model.parameters()))
    for value in weights.values():  # one at a time, so that few float weights are in memory at once
        mx.eval(value)
    kept: FolderContent = {
        name: value for name, value in export.content.items() if not name.startswith("model") and name != "config.json"
    }
    chosen = {"recipe": quantization.recipe} if quantization.recipe else {"bits": quantization.bits}
    manifest = export.manifest | {"quantization": {**chosen, "group_size": quantization.group_size}}
    return QuantizedModel(Export({"config.json": config, **kept, **_weight_files(weights)}, manifest), model)


def _check_widths(model: nn.Module, group_size: int) -> None:
    """Raise UserError for a layer that mlx-lm would silently leave out: its width is not divisible by the group size."""
    widths = {
        path: module.weight.shape[-1]
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
    }
    path = next((path for path, width in widths.items() if width % group_size), None)
    if path is not None:
        fits = [size for size in (64, 32) if size < group_size and not any(width % size for width in widths.values())]
        advice = (
            f"use --q-group-size {fits[0]}" if fits else "this model has no group size that mlx can quantise it with"
        )
        raise UserError(
            f"--q-group-size {group_size}: {path} is {widths[path]} wide, which it does not divide; {advice}"
        )


def _weight_files(weights: dict[str, mx.array]) -> FolderContent:
    shards = make_shards(weights)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    files: FolderContent = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": s for i, s in enumerate(shards, 1)}
    file_of_weight = {weight: name for name, shard in files.items() for weight in shard}
    size = sum(value.nbytes for value in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(file_of_weight.items()))}
    return {**files, "model.safetensors.index.json": index}
