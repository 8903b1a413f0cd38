"""Turn the options of `dylora export` into an export, and into the checks of the written folder."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import mlx.core as mx

from dylora_mlx.exporting import formats, full_model, verify
from dylora_mlx.exporting.formats import Export, MixtureRouting
from dylora_mlx.exporting.refit_router import refit_router
from dylora_mlx.exporting.verify import VerificationResult
from dylora_mlx.exporting.write import expert_to_fuse, parse_weights
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.run.run_folder import OpenedRun


class ExportPlan:
    """One export of a run: its content, and how to verify the written folder.

    Args:
        run: the run to export.
        options: as `dylora export` parses them. `options.format` selects the method that builds the export.
    """

    def __init__(self, run: OpenedRun, options: argparse.Namespace):
        self.run, self.out, self.kind = run, options.out, options.format
        self.routing: MixtureRouting | None = None
        self.expert: Expert | None = None
        self.expert_ids: list[int] = []
        self.weights: dict[str, float] = {}
        self.export: Export = getattr(self, f"_{self.kind.replace('-', '_')}")(options)

    def _experts(self, options: argparse.Namespace) -> Export:
        self.expert_ids = self._chosen_experts(options)
        return formats.export_experts(self.run, self.expert_ids)

    def _gguf_lora(self, options: argparse.Namespace) -> Export:
        self.expert_ids = self._chosen_experts(options)
        return formats.export_gguf_lora(self.run, self.expert_ids, options.dtype or "float32")

    def _chosen_experts(self, options: argparse.Namespace) -> list[int]:
        wanted = "all" if options.expert is None else options.expert
        all_expert_ids = list(range(1, len(self.run.pool) + 1))
        return all_expert_ids if wanted == "all" else [formats.find_expert(self.run.pool, self.run.library, wanted)]

    def _xlora(self, options: argparse.Namespace) -> Export:
        top_k = "run" if options.top_k is None else None if options.top_k == "dense" else int(options.top_k)
        gate = None
        if options.refit_router and (self.run.model.router_layer != "final" or self.run.model.document_mean.weight):
            refitted = refit_router(self.run)
            print(
                f"router fitted to final states: on held-out text {refitted.same:.1%} of tokens have the same first expert as "
                f"with the run's own, mean divergence {refitted.divergence:.4f} nats"
            )
            gate = refitted.gate
        self.routing = formats.mixture_routing(self.run, top_k, gate)
        return formats.export_mixture(self.run, self.routing, self.kind)

    _runtime = _xlora

    def _blend(self, options: argparse.Namespace) -> Export:
        self.weights = parse_weights(options.weights)
        return formats.export_blend(self.run, self.weights)

    def _merged(self, options: argparse.Namespace) -> Export:
        self.expert, manifest = expert_to_fuse(self.run, options.expert, options.weights)
        if self.run.base.is_quantized:
            print(
                f"{self.run.base.name} is quantised: the full model is written dequantised, so it is larger than the base"
            )
        return full_model.export_full_model(
            self.run, self.expert, manifest, getattr(mx, options.dtype) if options.dtype else None
        )

    def verify(self) -> Iterator[VerificationResult]:
        """Compare the written folder with the run in float32. Needs torch, transformers and peft."""
        if self.kind == "experts":
            return verify.verify_experts(self.run, self.out, self.expert_ids)
        if self.kind == "gguf-lora":
            return verify.verify_gguf_lora(self.run, self.out, self.expert_ids)
        if self.kind == "blend":
            expert_ids = {
                formats.find_expert(self.run.pool, self.run.library, name): weight
                for name, weight in self.weights.items()
            }
            return verify.verify_blend(self.run, self.out, expert_ids)
        if self.kind == "merged":
            assert self.expert is not None
            return verify.verify_full_model(self.run, self.out, self.expert)
        assert self.routing is not None
        return verify.verify_mixture(self.run, self.out, self.routing, self.kind)
