"""What each export format holds, as the content of a folder: nothing is written here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from dylora_mlx import __version__, assets
from dylora_mlx.adapters import peft, xlora
from dylora_mlx.adapters.fuse import blend_experts
from dylora_mlx.config import Source
from dylora_mlx.data import skills
from dylora_mlx.errors import UserError
from dylora_mlx.exporting.folder import FolderContent
from dylora_mlx.exporting.torch_models import RUNTIME
from dylora_mlx.growth import phases
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.pool import Pool
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.routing.router import Gate, Routing
from dylora_mlx.run.run_folder import OpenedRun

NULL_EXPERT = "base"
"""Name of gate column 0."""


class Export(NamedTuple):
    """A folder's content, and what its manifest says beside the hashes."""

    content: FolderContent
    manifest: dict[str, Any]


class MixtureRouting(NamedTuple):
    """How the exported mixture routes: the gate's rows, experts per token (None: dense), temperature, where the router
    reads, and how much of that is the document's mean."""

    gate: Gate
    top_k: int | None
    temperature: float
    router_layer: int | str
    document_mean_weight: float = 0.0

    @property
    def routing(self) -> Routing:
        return Routing(self.top_k, mx.array(self.temperature))


def mixture_routing(run: OpenedRun, top_k: int | str | None = "run", gate: Gate | None = None) -> MixtureRouting:
    """The routing of a run whose experts are all mature. top_k: another number of experts a token, None for dense; gate:
    rows that read the final states instead of the run's own."""
    settled = phases.final_schedule(run.config.growth)
    chosen = settled.top_k if top_k == "run" else top_k
    if isinstance(chosen, int) and chosen > len(run.pool):
        chosen = None  # all columns: dense
    assert not isinstance(chosen, str)
    if gate is not None:  # made for final states, the temperature in it
        return MixtureRouting(gate, chosen, 1.0, "final")
    return MixtureRouting(
        run.model.router.gate(), chosen, settled.temperature, run.model.router_layer, run.model.document_mean_weight
    )


def expert_names(pool: Pool) -> list[str]:
    """A name for every gate column: the skill that the expert was made for, numbered where two would be the same."""
    names = [NULL_EXPERT]
    for expert_id, record in enumerate(pool.records, 1):
        names.append(record.skill if record.skill not in names else f"{record.skill}-{expert_id}")
    return names


def find_expert(pool: Pool, library: Library, wanted: str) -> int:
    """The gate column of an expert's name, its number (expert_2 or 2), or a skill that it holds. Raises UserError."""
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
    """A PEFT LoRA folder for each expert."""
    base, content = base_name(run.base), {}
    for expert_id in expert_ids:
        content |= _adapter(f"expert_{expert_id}", run.model.experts[expert_id - 1], base)
    return Export(
        content,
        base_manifest(run, "experts")
        | {
            "experts": [_described(run.model, run.pool, run.library, c) for c in expert_ids],
            "expert_ids": list(expert_ids),
        },
    )


def export_mixture(run: OpenedRun, how: MixtureRouting, kind: str) -> Export:
    """The whole mixture: experts and gate in the layout of a PEFT X-LoRA folder, with the PyTorch runtime beside them.

    kind: xlora, which PEFT loads too, or runtime, for a router that taps an inner layer: only ours reads that. Raises
    UserError for what the format cannot say.
    """
    if run.base.args.model_type != "gemma3_text":
        raise UserError(
            f"a mixture is exported for Gemma 3 alone, and the base is {run.base.family.title}: use --format experts for a "
            "PEFT adapter of each expert, blend or merged"
        )
    if run.model.mixing != "layers":
        raise UserError("model.mixing: logits is for comparison and has no export; train with layers")
    if kind == "xlora" and how.router_layer != "final":
        raise UserError(
            f"this run's router reads layer {how.router_layer}, and X-LoRA reads final states: use --format runtime, or "
            "--refit-router to fit the gate to final states and see how far it agrees"
        )
    if kind == "xlora" and how.document_mean_weight:
        raise UserError(
            f"this run's router reads the document so far (model.document_mean_weight: {how.document_mean_weight:g}), and "
            "X-LoRA reads single tokens: use --format runtime, or --refit-router to fit the gate to them and see how far it "
            "agrees; a run with --model.document_mean_weight 0 needs neither"
        )
    base, dims = base_name(run.base), run.base.args.hidden_size
    pool = [xlora.null_expert(run.model.shapes), *run.model.experts]
    content: FolderContent = {"adapter_model.safetensors": xlora.classifier(how.gate, how.temperature, how.top_k)}
    if kind == "xlora":
        content["adapter_config.json"] = xlora.config(dims, len(pool), how.top_k, base)
    for expert_id, expert in enumerate(pool):
        content |= _adapter(str(expert_id), expert, base)
    content[RUNTIME.name] = RUNTIME
    said: dict[str, Any] = {
        "router_layer": how.router_layer,
        "document_mean_weight": how.document_mean_weight,
        "top_k": how.top_k,
    }
    said["experts"] = [_described(run.model, run.pool, run.library, c, e) for c, e in enumerate(pool)]
    said["first_layer"] = min(run.model.shapes)  # below it nothing is adapted, wherever the router reads
    return Export(content, base_manifest(run, kind) | said)


def export_blend(run: OpenedRun, weights: Mapping[str, float]) -> Export:
    """One static PEFT LoRA adapter: the weighted sum of some experts."""
    made = blend_by_name(run, weights)
    return Export(_adapter("", made, base_name(run.base)), base_manifest(run, "blend") | {"weights": dict(weights)})


def blend_by_name(run: OpenedRun, weights: Mapping[str, float]) -> Expert:
    """A weighted sum of experts by name, as one. Raises UserError for a name that is not there or for no weight."""
    expert_ids = [find_expert(run.pool, run.library, name) for name in weights]
    if len(set(expert_ids)) < len(expert_ids):
        raise UserError(f"--weights: two of {', '.join(weights)} are the same expert")
    pool = [run.model.experts[expert_id - 1] for expert_id in expert_ids]
    try:
        return blend_experts(pool, list(weights.values()), run.model.shapes)
    except ValueError as error:
        raise UserError(f"--weights: {error}") from error


def base_name(base: Base) -> str:
    """What others load the base by: a hub id, or a folder on this machine."""
    return str(assets.BASE) if base.name == "embedded" else base.name


def _adapter(folder: str, expert: Expert, base: str) -> FolderContent:
    prefix = f"{folder}/" if folder else ""
    return {
        f"{prefix}adapter_model.safetensors": peft.weights(expert),
        f"{prefix}adapter_config.json": peft.config(expert, base),
    }


def base_manifest(run: OpenedRun, kind: str) -> dict[str, Any]:
    """What every export says of itself."""
    args, config = run.base.args, run.config
    base = {"name": base_name(run.base), "fingerprint": run.base.fingerprint}
    base |= {"hidden_size": args.hidden_size, "layers": args.num_hidden_layers}
    base_skill = config.growth.base_skill
    splits = {name: getattr(config.data, name) for name in ("validation_fraction", "test_fraction")}
    return {
        "kind": kind,
        "dylora_mlx": __version__,
        "base": base,
        "sources": [_public(source) for source in config.skills],
        "base_skill": None if base_skill is None else _public(base_skill),
        "projections": list(config.model.projections),
        "splits": {**splits, "seed": config.seed},
    }


def _public(source: Source) -> dict[str, Any]:
    """How to read a skill's data again; of a local file the name only: an export tells nobody how a disk is laid out."""
    options = {name: value for name, value in asdict(source).items() if value is not None}
    try:
        local = skills.locate_source(source) is not None
    except UserError:  # gone since
        local = True
    if local and not source.source.startswith("packaged/"):
        options["source"] = Path(source.source).name
    return options


def _described(
    model: RoutedDecoder, pool: Pool, library: Library, expert_id: int, expert: Expert | None = None
) -> dict[str, Any]:
    expert = expert or model.experts[expert_id - 1]
    held = [entry.skill for entry in library.entries if entry.expert == expert_id]
    return {"name": expert_names(pool)[expert_id], "skills": held, "rank": expert.rank, "alpha": expert.alpha}
