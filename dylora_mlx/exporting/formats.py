"""Content of each export format, as files of a folder and fields of its manifest. Nothing is written here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from dylora_mlx import __version__, assets
from dylora_mlx.adapters import gguf_lora, peft, xlora
from dylora_mlx.adapters.fuse import blend_experts
from dylora_mlx.config import Source
from dylora_mlx.data import skills
from dylora_mlx.errors import UserError
from dylora_mlx.exporting import gguf_file
from dylora_mlx.exporting.folder import FolderContent
from dylora_mlx.exporting.torch_models import RUNTIME
from dylora_mlx.growth import phases
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.pool import Pool
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.gguf.tensors import require_package
from dylora_mlx.model.gguf.weights import DType
from dylora_mlx.model.routing.document_mean import TOKENS_ALONE, DocumentMean
from dylora_mlx.model.routing.router import Gate, Routing
from dylora_mlx.run.prompt_format import prompt_manifest
from dylora_mlx.run.run_folder import OpenedRun

NULL_EXPERT = "base"
"""Name of the null expert, gate column 0: the base without an adapter."""


class Export(NamedTuple):
    """An export before it is written."""

    content: FolderContent
    """Files by relative path."""
    manifest: dict[str, Any]
    """Manifest fields besides the format and the hashes."""


class MixtureRouting(NamedTuple):
    """Routing of an exported mixture."""

    gate: Gate
    """All rows of the router."""
    top_k: int | None
    """Experts per token; None for dense routing."""
    temperature: float
    """Softmax temperature of the gates."""
    router_layer: int | str
    """Where the router reads: "final", or the index of the layer whose input it reads."""
    document_mean: DocumentMean = TOKENS_ALONE
    """How the router's input mixes a token with the mean of its document."""

    @property
    def routing(self) -> Routing:
        """The routing that the decoder takes."""
        return Routing(self.top_k, mx.array(self.temperature))


def mixture_routing(run: OpenedRun, top_k: int | str | None = "run", gate: Gate | None = None) -> MixtureRouting:
    """Return the run's routing in its final phase, where all experts are mature.

    Args:
        run: the run.
        top_k: "run" for the run's own top-k, another number of experts per token, or None for dense routing.
        gate: a refitted gate over final states, to use instead of the run's own.
    """
    final_routing = phases.final_schedule(run.config.growth)
    chosen_top_k = final_routing.top_k if top_k == "run" else top_k
    if isinstance(chosen_top_k, int) and chosen_top_k > len(run.pool):
        chosen_top_k = None  # top-k over all columns is dense routing
    assert not isinstance(chosen_top_k, str)
    if gate is not None:  # refitted to final states; the fit already contains the temperature
        return MixtureRouting(gate, chosen_top_k, 1.0, "final")
    return MixtureRouting(
        run.model.router.gate(),
        chosen_top_k,
        final_routing.temperature,
        run.model.router_layer,
        run.model.document_mean,
    )


def expert_names(pool: Pool) -> list[str]:
    """Return a unique name for every gate column: the skill the expert was created for, with its expert_id if taken."""
    names = [NULL_EXPERT]
    for expert_id, record in enumerate(pool.records, 1):
        names.append(record.skill if record.skill not in names else f"{record.skill}-{expert_id}")
    return names


def find_expert(pool: Pool, library: Library, wanted: str) -> int:
    """Return the gate column of an expert, by its name, its number (expert_2 or 2), or a skill that it serves.

    Raises UserError if no expert matches.
    """
    names, number = expert_names(pool), wanted.removeprefix("expert_")
    if wanted in names[1:]:
        return names.index(wanted)
    if number.isdecimal() and 1 <= int(number) < len(names):
        return int(number)
    held = library.experts_of.get(wanted, 0)
    if held:
        return held
    there = ", ".join(f"{expert_id} ({name})" for expert_id, name in enumerate(names[1:], 1))
    raise UserError(f"no expert '{wanted}' in this run, there are {there or 'none'}")


def export_experts(run: OpenedRun, expert_ids: Sequence[int]) -> Export:
    """Export each expert as a PEFT LoRA adapter in its own subfolder, expert_N."""
    base, content = base_name(run.base), {}
    for expert_id in expert_ids:
        content |= _adapter_files(f"expert_{expert_id}", run.model.experts[expert_id - 1], base)
    return Export(content, base_manifest(run, "experts") | _describe_experts(run, expert_ids))


def export_gguf_lora(run: OpenedRun, expert_ids: Sequence[int], dtype: DType = "float32") -> Export:
    """Export each expert as a GGUF LoRA file for llama.cpp, expert_N.gguf.

    Args:
        run: the run.
        expert_ids: gate columns of the experts.
        dtype: dtype of the factors.

    Raises UserError if the `gguf` package is not installed, and for a base that llama.cpp cannot compute.
    """
    require_package()
    if not run.base.family.rope_half:
        raise UserError(
            f"{run.base.name} rotates neighbouring dimensions (rope_traditional), which llama.cpp's converter takes for "
            "halves: no GGUF file of this base fits an adapter; use --format merged or experts"
        )
    described, content = _describe_experts(run, expert_ids), {}
    for expert_id, about in zip(expert_ids, described["experts"], strict=True):
        expert = run.model.experts[expert_id - 1]
        metadata = gguf_lora.metadata(expert, about["name"], about["skills"])
        content[f"expert_{expert_id}.gguf"] = partial(
            gguf_file.write_adapter, expert=expert, config=vars(run.base.args), metadata=metadata, dtype=dtype
        )
    manifest = base_manifest(run, "gguf-lora")
    # llama.cpp is told where the base is, so a local one needs no path here.
    path = Path(run.base.name).expanduser()
    base = {**manifest["base"], "name": path.name if path.exists() else run.base.name}
    return Export(content, manifest | described | {"base": base, "dtype": dtype})


def _describe_experts(run: OpenedRun, expert_ids: Sequence[int]) -> dict[str, Any]:
    return {
        "experts": [_describe_expert(run.model, run.pool, run.library, expert_id) for expert_id in expert_ids],
        "expert_ids": list(expert_ids),
    }


def export_mixture(run: OpenedRun, routing: MixtureRouting, kind: str) -> Export:
    """Export all experts and the router in the layout of a PEFT X-LoRA folder, together with the PyTorch runtime.

    Args:
        run: the run.
        routing: how the exported mixture routes.
        kind: "xlora", which PEFT loads too, or "runtime", which only the PyTorch runtime loads. X-LoRA cannot represent
            a router that reads a layer's input or the document mean.

    Raises UserError for a run that the format cannot represent.
    """
    if run.base.args.model_type != "gemma3_text":
        raise UserError(
            f"a mixture is exported for Gemma 3 alone, and the base is {run.base.family.title}: use --format experts for a "
            "PEFT adapter of each expert, blend or merged"
        )
    if run.base.is_quantized:
        raise UserError(
            f"{run.base.name} is quantised by mlx-lm, which PyTorch cannot load, and --format {kind} runs on it: use --format "
            "merged, which is written dequantised, or experts for a PEFT adapter of each expert"
        )
    if run.model.mixing != "layers":
        raise UserError("model.mixing: logits is for comparison and has no export; train with layers")
    if kind == "xlora" and routing.router_layer != "final":
        raise UserError(
            f"this run's router reads layer {routing.router_layer}, and X-LoRA reads final states: use --format runtime, or "
            "--refit-router to fit the gate to final states and see how far it agrees"
        )
    if kind == "xlora" and routing.document_mean.weight:
        raise UserError(
            f"this run's router reads the document so far (model.document_mean_weight: {routing.document_mean.weight:g}), and "
            "X-LoRA reads single tokens: use --format runtime, or --refit-router to fit the gate to them and see how far it "
            "agrees; a run with --model.document_mean_weight 0 needs neither"
        )
    base, hidden_size = base_name(run.base), run.base.args.hidden_size
    pool = [xlora.null_expert(run.model.shapes), *run.model.experts]
    content: FolderContent = {
        "adapter_model.safetensors": xlora.classifier(routing.gate, routing.temperature, routing.top_k)
    }
    if kind == "xlora":
        content["adapter_config.json"] = xlora.config(hidden_size, len(pool), routing.top_k, base)
    for expert_id, expert in enumerate(pool):
        content |= _adapter_files(str(expert_id), expert, base)
    content[RUNTIME.name] = RUNTIME
    manifest: dict[str, Any] = {
        "router_layer": routing.router_layer,
        "document_mean_weight": routing.document_mean.weight,
        "document_mean_decay": routing.document_mean.decay,
        "top_k": routing.top_k,
    }
    manifest["experts"] = [_describe_expert(run.model, run.pool, run.library, c, e) for c, e in enumerate(pool)]
    manifest["first_layer"] = min(run.model.shapes)  # no lower layer is adapted, wherever the router reads
    return Export(content, base_manifest(run, kind) | manifest)


def export_blend(run: OpenedRun, weights: Mapping[str, float]) -> Export:
    """Export the weighted sum of some experts as one static PEFT LoRA adapter."""
    blend = blend_by_name(run, weights)
    return Export(
        _adapter_files("", blend, base_name(run.base)), base_manifest(run, "blend") | {"weights": dict(weights)}
    )


def blend_by_name(run: OpenedRun, weights: Mapping[str, float], option: str = "--weights") -> Expert:
    """Return the weighted sum of some experts as one expert. weights: by expert name. option: for messages.

    Raises UserError for an unknown name, for two names of one expert, or if no weight is other than 0.
    """
    expert_ids = [find_expert(run.pool, run.library, name) for name in weights]
    if len(set(expert_ids)) < len(expert_ids):
        raise UserError(f"{option}: two of {', '.join(weights)} are the same expert")
    pool = [run.model.experts[expert_id - 1] for expert_id in expert_ids]
    try:
        return blend_experts(pool, list(weights.values()), run.model.shapes)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from error


def base_name(base: Base) -> str:
    """Return the name that other libraries load the base by: a hub id or a local folder, for a GGUF file the converted one."""
    if base.name == "embedded":
        return str(assets.BASE)
    return str(base.folder) if Path(base.name).expanduser().is_file() else base.name


def _adapter_files(folder: str, expert: Expert, base: str) -> FolderContent:
    prefix = f"{folder}/" if folder else ""
    return {
        f"{prefix}adapter_model.safetensors": peft.weights(expert),
        f"{prefix}adapter_config.json": peft.config(expert, base),
    }


def base_manifest(run: OpenedRun, kind: str) -> dict[str, Any]:
    """Return the manifest fields that every export has: versions, base, data sources and splits."""
    args, config = run.base.args, run.config
    base: dict[str, Any] = {"name": base_name(run.base), "fingerprint": run.base.fingerprint}
    base |= {"hidden_size": args.hidden_size, "layers": args.num_hidden_layers}
    base_skill = config.growth.base_skill
    splits = {name: getattr(config.data, name) for name in ("validation_fraction", "test_fraction")}
    return {
        "kind": kind,
        "dylora_mlx": __version__,
        "base": base,
        "sources": [_public_source(source) for source in config.skills],
        "base_skill": None if base_skill is None else _public_source(base_skill),
        "projections": list(config.model.projection_names),
        "splits": {**splits, "seed": config.seed},
        "prompt": None if run.base.tokenizer is None else prompt_manifest(run.library, run.base.tokenizer),
    }


def _public_source(source: Source) -> dict[str, Any]:
    """Return a data source's options for the manifest. A local path is cut to its name: exports must not leak paths."""
    options = {name: value for name, value in asdict(source).items() if value is not None}
    try:
        local = skills.locate_source(source) is not None
    except UserError:  # a local file that no longer exists
        local = True
    if local and not source.source.startswith("packaged/"):
        options["source"] = Path(source.source).name
    return options


def _describe_expert(
    model: RoutedDecoder, pool: Pool, library: Library, expert_id: int, expert: Expert | None = None
) -> dict[str, Any]:
    expert = expert or model.experts[expert_id - 1]
    skill_names = [entry.skill for entry in library.entries if entry.expert == expert_id]
    return {"name": expert_names(pool)[expert_id], "skills": skill_names, "rank": expert.rank, "alpha": expert.alpha}
