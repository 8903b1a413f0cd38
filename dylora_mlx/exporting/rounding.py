"""What rounding the weights of a fused model costs: the share of the update that is left, and the loss of its skills."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx

from dylora_mlx.adapters.fuse import dequantize_weights, weight_updates
from dylora_mlx.config import Source
from dylora_mlx.errors import UserError
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.routing.router import forced_routing
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.training.step.domains import Domain, make_held_out
from dylora_mlx.training.step.evaluate import evaluate


class Rounding(NamedTuple):
    """How much of the update of one projection, over all layers, the written weights hold."""

    update: float
    """Root mean square of the update dW."""
    error: float
    """Root mean square of Q(W + dW) - Q(W) - dW, where Q rounds as the written file does."""
    direction: float
    """<Q(W + dW) - Q(W), dW> / <dW, dW>: what is left along the update, 1 for all of it. Where it is 1 and the energy is
    gone, rounding has not lost the update but hidden it under noise."""

    @property
    def kept_share(self) -> float:
        """Share of the update's energy that is left, 0 to 1: 1 - error^2 / update^2, and 0 where that is negative."""
        return max(0.0, 1 - (self.error / self.update) ** 2)


def rounding_by_projection(
    expert: Expert,
    base_weights: Mapping[str, mx.array],
    written: Mapping[str, mx.array],
    options: dict[str, Any] | None,
) -> dict[str, Rounding]:
    """Compare what an expert changed in the written weights with its update.

    Args:
        expert: the expert or blend that is fused.
        base_weights: the weights that the model would have without it, in the stored dtype, by name.
        written: the weights that are written.
        options: quantization of the written config; None for float weights.

    Returns:
        By projection; one whose update is exactly zero is left out.
    """
    errors: dict[str, float] = defaultdict(float)
    products: dict[str, float] = defaultdict(float)
    energies: dict[str, float] = defaultdict(float)
    sizes: dict[str, int] = defaultdict(int)
    updates = weight_updates(expert)
    for name in list(updates):
        update, path = updates.pop(name), name.removesuffix(".weight")  # popped: a matrix is in memory only here
        projection = path.rsplit(".", 1)[1]
        base, fused = base_weights[name], written[name]
        if options is not None:
            module = options[path] if isinstance(options.get(path), dict) else options
            size_and_bits = {"group_size": module["group_size"], "bits": module["bits"]}
            base = mx.dequantize(*mx.quantize(base, **size_and_bits), **size_and_bits)
            parts = {key: written[key] for key in (name, f"{path}.scales", f"{path}.biases")}
            fused = dequantize_weights({name: fused}, parts, options, mx.float32)[name]
        change = fused.astype(mx.float32) - base.astype(mx.float32)
        error = change - update
        products[projection] += float((change * update).sum().item())  # pyright: ignore[reportArgumentType]
        errors[projection] += float((error * error).sum().item())  # pyright: ignore[reportArgumentType]
        energies[projection] += float((update * update).sum().item())  # pyright: ignore[reportArgumentType]
        sizes[projection] += update.size
    return {
        name: Rounding(math.sqrt(energy / sizes[name]), math.sqrt(errors[name] / sizes[name]), products[name] / energy)
        for name, energy in energies.items()
        if energy
    }


class FusedLosses(NamedTuple):
    """Losses of one skill's held-out documents, in nats per token."""

    skill: str
    documents: int
    base: float
    fused: float
    """Of the float model with the expert fused in."""
    quantized: float


def fused_losses(run: OpenedRun, sources: Sequence[Source], fused: Any, quantized: Any) -> list[FusedLosses]:
    """Measure what quantising costs, on the test documents that the end of the run was measured on.

    Args:
        run: the run.
        sources: the skills that the expert or blend serves.
        fused: mlx-lm's model of the float weights. It is cast to the dtype that the run computes in.
        quantized: mlx-lm's model of the quantised ones; it is cast too.

    Raises UserError for a source that cannot be read, and for one that holds other records now.
    """
    for model in (fused, quantized):
        model.set_dtype(run.base.dtype)
        # The whole module, RoPE's frequencies included: a lazy array belongs to the thread that created it.
        mx.eval(model)
    domains = make_held_out(run.read_sources(sources), run.config, compiled=False).test
    models = (run.base.model, fused, quantized)
    return [
        FusedLosses(
            name,
            domain.coverage.documents if domain.coverage else 0,
            *(_loss(replace(run.base, model=model), domain) for model in models),
        )
        for name, domain in domains.items()
    ]


def _loss(base: Base, domain: Domain) -> float:
    # A domain caches the features of one model, so each model has its own.
    return evaluate(RoutedDecoder(base, [], "final"), replace(domain, features=[]), forced_routing(), 0).loss


def served_sources(run: OpenedRun, expert_ids: Sequence[int]) -> list[Source]:
    """Return the sources of the skills that these experts serve. A skill that was split stands for its parts.

    Raises UserError if the run's config has none of them.
    """
    names = [entry.skill for entry in run.library.entries if entry.expert in expert_ids]
    wanted = {*names, *(name.rpartition(".")[0] for name in names)}
    sources = [source for source in run.config.skills if source.name in wanted]
    if not sources:
        raise UserError("the run's config has no source of a skill that this expert serves")
    return sources
