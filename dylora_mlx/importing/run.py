"""Import a mixture as a new run: an X-LoRA folder from this package or PEFT, or a folder for the PyTorch runtime."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from dylora_mlx.adapters.xlora import CLASSIFIER
from dylora_mlx.config import Config, DataConfig, GrowthConfig, LogConfig, ModelConfig, Source
from dylora_mlx.config.load import to_yaml
from dylora_mlx.config.paths import is_template_text, resolve_base, resolve_source
from dylora_mlx.data import rendering
from dylora_mlx.data.chat_template import resolve_template
from dylora_mlx.data.kept import RunSources
from dylora_mlx.errors import UserError
from dylora_mlx.exporting import formats
from dylora_mlx.exporting.folder import MANIFEST, read_arrays, read_manifest
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.growth.pool import Pool
from dylora_mlx.importing import adapters
from dylora_mlx.importing.common import add_frozen_expert, check_base, log_import, parse_source
from dylora_mlx.model.base import device
from dylora_mlx.model.base.load import Base, load_base
from dylora_mlx.model.base.tokenizer import Tokenizer
from dylora_mlx.model.routing.document_mean import DocumentMean
from dylora_mlx.model.routing.router import GateRow
from dylora_mlx.run.build import make_decoder
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.system import console
from dylora_mlx.system.files import atomic_folder, check_run_parent, read_json, write_error
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint.state import pool_files
from dylora_mlx.training.skill.base_pass import run_base_pass

NEVER_CHOSEN = -1e9
"""Bias of a gate row that routing never selects: its gate is 0 for every token."""


class ImportedMixture(NamedTuple):
    """A mixture as read from its folder. Lists are by column of the folder's classifier."""

    experts: list[adapters.ForeignAdapter | None]
    """The adapters; None for the first one that changes nothing, the null expert."""
    names: list[str]
    """Expert names."""
    skills: list[list[str]]
    """Names of the skills that each expert serves."""
    weight: mx.array
    """The gate's weight, float32 [E, D], with the temperature divided out."""
    bias: mx.array
    """The gate's bias, float32 [E], with the temperature divided out."""
    top_k: int | None
    """Experts per token; None for dense routing."""
    router_layer: int | str
    """Where the router reads: "final", or the index of the layer whose input it reads."""
    document_mean: DocumentMean
    """Share of the document mean in what the router reads, 0 to 1."""
    base: str
    """Name or folder of the base; empty if the folder does not name one."""
    fingerprint: str
    """The base's fingerprint; empty for a folder without a manifest."""
    projections: list[str]
    """Names of the projections that carry experts."""
    sources: dict[str, Source]
    """Data sources by skill name."""
    data: DataConfig
    """How the skills' data are split."""
    seed: int
    """Seed of the data split."""
    chat_template: str | None
    """Jinja text in which the mixture is asked; None if it is not asked as a chat, or its folder does not say."""


def import_mixture(folder: Path, out: Path, base: str | None, texts: Sequence[Source]) -> OpenedRun:
    """Create a run from a mixture's folder: X-LoRA from this package or from PEFT, or the PyTorch runtime's.

    Args:
        folder: the mixture's folder.
        out: the run folder to create.
        base: base to use instead of the one that the folder names.
        texts: sample text of the skills. For a folder without a manifest they name the experts, in the adapters' order.
            Without text a skill is not remembered, and importing more experts later needs remembered skills.

    Raises UserError for routing that a run cannot represent, a base that is missing or another one, or a run folder
    that exists.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; choose another --name")
    check_run_parent(out)
    texts = [resolve_source(text) for text in texts]
    mixture = read_mixture(folder, texts)
    if not (base or mixture.base):
        raise UserError(f"{folder}: does not say what its base is; give it with --base")
    device.set_memory_limits()
    loaded_base = load_base(base or mixture.base, "auto")
    if mixture.fingerprint not in ("", loaded_base.fingerprint):
        raise UserError(
            f"{folder}: these experts were trained on another base than {loaded_base.name} ({mixture.base})"
        )
    check_base(mixture.base, loaded_base, folder, bool(mixture.fingerprint) or base is not None)
    _check_sizes(mixture, loaded_base, folder)
    template = mixture.chat_template
    if template is not None and template != rendering.effective_template(loaded_base.tokenizer):
        loaded_base = replace(loaded_base, tokenizer=Tokenizer(loaded_base.folder, template))
        mixture = mixture._replace(data=replace(mixture.data, chat_template=template))
    config = _config(mixture, loaded_base, folder)
    model = make_decoder(config, loaded_base)
    pool, library = Pool(model), Library(loaded_base.fingerprint)
    for expert_id, adapter in enumerate(mixture.experts):
        if adapter is not None:
            add_frozen_expert(
                pool, adapters.to_expert(adapter, model.shapes, folder / str(expert_id)), mixture.names[expert_id]
            )
    _set_gate_rows(model.router.rows, mixture)
    sources = _fill_library(mixture, {text.name for text in texts}, config, loaded_base, pool, library)
    try:
        with atomic_folder(out) as temporary:
            (temporary / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
            checkpoint.write(temporary / "checkpoints" / "final", pool_files(loaded_base, pool, library))
            sources.write_new(temporary)
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError when a write fails
        raise write_error(out, error, "choose another --out") from error
    for expert_id, record in enumerate(pool.records, 1):
        log_import(out, record.skill, expert_id, folder)
    return OpenedRun(config, loaded_base, model, pool, library, out / "checkpoints" / "final", RunSources(out))


def read_mixture(folder: Path, texts: Sequence[Source]) -> ImportedMixture:
    """Read a mixture's folder without loading its base.

    Raises UserError for routing that a run cannot represent, or a damaged file.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a mixture's folder or a hub id such as OWNER/NAME")
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    if manifest and manifest.get("kind") not in ("xlora", "runtime"):
        raise UserError(
            f"{folder}: a '{manifest.get('kind')}' export, not a mixture; experts come in by dylora import-expert"
        )
    config = _xlora_options(folder) if manifest.get("kind") != "runtime" else {}
    gate = read_arrays(folder / "adapter_model.safetensors")
    for name in gate.keys() ^ {f"{CLASSIFIER}weight", f"{CLASSIFIER}bias"}:
        raise UserError(f"{folder / 'adapter_model.safetensors'}: '{name}' is {_classifier_problem(name, gate)}")
    weight, bias = (gate[f"{CLASSIFIER}{part}"].astype(mx.float32) for part in ("weight", "bias"))
    if config.get("enable_softmax", bool(config)) and "softmax_temperature" in config:
        temperature = float(adapters.positive_number(config, "softmax_temperature", folder / adapters.CONFIG))
        weight, bias = weight / temperature, bias / temperature
    count = weight.shape[0] if weight.ndim else 0
    is_finite = mx.isfinite(weight).all().item() and mx.isfinite(bias).all().item()
    if weight.ndim != 2 or bias.shape != (count,) or not is_finite:
        raise UserError(f"{folder / 'adapter_model.safetensors'}: not a finite linear classifier")
    for part, expert_ids in (("adapters", config.get("adapters")), ("experts", manifest.get("experts"))):
        if expert_ids is not None and (not isinstance(expert_ids, list | dict) or len(expert_ids) != count):
            raise UserError(f"{folder}: its {part} are not as many as the {count} columns of the classifier")
    foreign_adapters = [adapters.read_adapter(folder / str(expert_id)) for expert_id in range(count)]
    null_id = next((expert_id for expert_id, adapter in enumerate(foreign_adapters) if _is_null(adapter)), None)
    experts = [None if expert_id == null_id else adapter for expert_id, adapter in enumerate(foreign_adapters)]
    try:
        names, skills, sources = _describe_skills(manifest, experts, texts, folder)
        top_k = manifest["top_k"] if manifest else config.get("top_k_lora")
        base_name = manifest["base"]["name"] if manifest else str(config.get("base_model_name_or_path") or "")
        fingerprint, router_layer = (
            manifest["base"]["fingerprint"] if manifest else "",
            manifest.get("router_layer", "final"),
        )
        decay = manifest.get("document_mean_decay", 1.0)  # exports of earlier versions have the plain mean
        mean = DocumentMean(float(manifest.get("document_mean_weight", 0.0)), float(decay))
        splits = dict(manifest.get("splits", {}))
        seed, data = int(splits.pop("seed", 0)), DataConfig(**splits)
        template = (manifest.get("prompt") or {}).get("chat_template")
        if template is not None and (not isinstance(template, str) or not is_template_text(template)):
            raise TypeError("a chat template that is none")
        template = resolve_template(template)
        if top_k is not None and (type(top_k) is not int or top_k < 1):
            raise ValueError(f"top_k {top_k!r:.80}")
        if not all(
            isinstance(name, str) for name in (base_name, fingerprint, *names, *(s for held in skills for s in held))
        ):
            raise TypeError("a name that is no text")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{folder}: does not describe a mixture ({error})") from error
    used_projections = {path.rsplit(".", 1)[1] for adapter in foreign_adapters for path in adapter.factors}
    projections = manifest.get("projections") or sorted(used_projections)
    return ImportedMixture(
        experts,
        names,
        skills,
        weight,
        bias,
        top_k,
        router_layer,
        mean,
        base_name,
        fingerprint,
        projections,
        sources,
        data,
        seed,
        template,
    )


def _check_sizes(mixture: ImportedMixture, base: Base, folder: Path) -> None:
    hidden_size, num_layers = base.args.hidden_size, base.args.num_hidden_layers
    if mixture.weight.shape[1] != hidden_size:
        raise UserError(
            f"{folder}: its gate reads states of {mixture.weight.shape[1]} numbers, {base.name} has "
            f"{hidden_size}: it belongs to another base"
        )
    if mixture.router_layer != "final" and (
        not isinstance(mixture.router_layer, int) or not 0 <= mixture.router_layer < num_layers
    ):
        raise UserError(
            f"{folder}: its router reads layer {mixture.router_layer}, but {base.name} has layers 0 to {num_layers - 1}"
        )


def _classifier_problem(name: str, gate: Mapping[str, mx.array]) -> str:
    return "not a linear classifier's, xlora_depth must be 1" if name in gate else "missing"


def _xlora_options(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json of an X-LoRA mixture that a run can represent.

    That is: a linear classifier, gates that sum to 1, and a router that reads the base without adapters. Raises
    UserError for any other.
    """
    config_path = folder / adapters.CONFIG
    config = read_json(config_path)
    if config.get("peft_type") != "XLORA":
        raise UserError(f"{config_path}: peft_type {config.get('peft_type')!r}, not an X-LoRA mixture")
    softmax, top_k_softmax = bool(config.get("enable_softmax", True)), bool(config.get("enable_softmax_topk"))
    top_k = config.get("top_k_lora")
    unsupported = {
        "xlora_depth": config.get("xlora_depth", 1) != 1,
        "layerwise_scalings": bool(config.get("layerwise_scalings")),
        "scaling_pass_value": config.get("scaling_pass_value", 0.0) != 0,
        "global_scaling_weight": config.get("global_scaling_weight", 1.0) != 1,
        "enable_softmax": softmax == top_k_softmax,
        "top_k_lora": (top_k is None) == top_k_softmax,
    }
    for name, is_unsupported in unsupported.items():
        if is_unsupported:
            raise UserError(
                f"{config_path}: {name} {config.get(name)!r}: a run has one linear gate for all layers, softmax over all experts or "
                "over the k largest (enable_softmax_topk alone), and reads the base without adapters"
            )
    return config


def _is_null(adapter: adapters.ForeignAdapter) -> bool:
    """Whether an adapter changes nothing: all its b factors are zero."""
    return all(not b.any().item() for _, b in adapter.factors.values())


def _describe_skills(
    manifest: Mapping[str, Any], experts: Sequence[object], texts: Sequence[Source], folder: Path
) -> tuple[list[str], list[list[str]], dict[str, Source]]:
    """Return the experts' names, the skills that each serves, and the skills' data sources by name.

    They come from the manifest. Without one, each source in `texts` names one adapter, in order.
    """
    named_sources = {text.name: text for text in texts}
    if manifest:
        manifest_experts = manifest["experts"]
        base_skill = [manifest["base_skill"]] if manifest["base_skill"] is not None else []
        sources = {options["name"]: parse_source(options) for options in (*base_skill, *manifest["sources"])}
        return (
            [c["name"] for c in manifest_experts],
            [list(c["skills"]) for c in manifest_experts],
            sources | named_sources,
        )
    adapter_ids = [expert_id for expert_id, expert in enumerate(experts) if expert is not None]
    if len(named_sources) != len(adapter_ids):
        raise UserError(
            f"{folder}: this folder does not say what its {len(adapter_ids)} experts are for; name each, in their order, with "
            "--text NAME=SOURCE"
        )
    names = [formats.NULL_EXPERT] * len(experts)
    for expert_id, name in zip(adapter_ids, named_sources, strict=True):
        names[expert_id] = name
    return names, [[name] if name != formats.NULL_EXPERT else [] for name in names], named_sources


def _config(mixture: ImportedMixture, base: Base, folder: Path) -> Config:
    adapters_in_use = [adapter for adapter in mixture.experts if adapter is not None]
    if not adapters_in_use:
        raise UserError(f"{folder}: no adapter of this mixture changes anything")
    base_skills = next((s for c, s in enumerate(mixture.skills) if mixture.experts[c] is None and s), [])
    sources = [source for name, source in mixture.sources.items() if name not in base_skills]
    base_skill = mixture.sources.get(base_skills[0]) if base_skills else None
    num_adapters = len(adapters_in_use)
    try:
        growth = GrowthConfig(top_k=mixture.top_k or num_adapters + 1, final_temperature=1.0, base_skill=base_skill)
        router_options: dict[str, Any] = {
            "router_layer": mixture.router_layer,
            "document_mean_weight": mixture.document_mean.weight,
            "document_mean_decay": mixture.document_mean.decay,
        }
        model = ModelConfig(base=resolve_base(base.name), projections=list(mixture.projections), **router_options)
        return Config(skills=sources, seed=mixture.seed, model=model, growth=growth, data=mixture.data, log=LogConfig())
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder}: its description gives no valid run config ({error})") from error


def _set_gate_rows(rows: list[GateRow], mixture: ImportedMixture) -> None:
    """Copy the mixture's gate into the router's rows. Without a null expert, row 0 is set to be never selected."""
    expert_ids = [c for c, adapter in enumerate(mixture.experts) if adapter is not None]
    null_id = next((c for c, adapter in enumerate(mixture.experts) if adapter is None), None)
    if null_id is None:
        rows[0].bias = mx.array([NEVER_CHOSEN])
    else:
        rows[0].weight, rows[0].bias = mixture.weight[null_id], mixture.bias[null_id : null_id + 1]
    for row, expert_id in zip(rows[1:], expert_ids, strict=True):
        row.weight, row.bias = mixture.weight[expert_id], mixture.bias[expert_id : expert_id + 1]


def _fill_library(
    mixture: ImportedMixture, named_skills: Collection[str], config: Config, base: Base, pool: Pool, library: Library
) -> RunSources:
    """Fill the run's library from the skills' text. A skill without available text gets a warning and no entry.

    Returns the text that was read, which the run keeps.

    Args:
        mixture: the mixture.
        named_skills: skills whose text this import named.
        config: the run's config.
        base: the loaded base.
        pool: the run's experts.
        library: the library to fill.
    """
    expert_id_of = {
        name: expert_id for expert_id, name in enumerate([formats.NULL_EXPERT, *(r.skill for r in pool.records)])
    }
    sources = RunSources()
    for expert_id, skill_names in enumerate(mixture.skills):
        for name in skill_names:
            source = mixture.sources.get(name)
            try:
                # An export stores only the name of a local file. A file of that name here need not be the same one.
                if source is None or ("/" not in source.source and name not in named_skills):
                    raise UserError("its text is not on this machine")
                (skill,) = sources.read_all([source], config, base.tokenizer, base.args.vocab_size)
            except UserError as error:
                console.warn(f"{name}: nothing of it is remembered ({error}); name its text with --text {name}=SOURCE")
                continue
            base_pass = run_base_pass(pool.model, skill, config)
            expert = expert_id_of.get(mixture.names[expert_id], 0) if mixture.experts[expert_id] is not None else 0
            library.add(
                LibraryEntry(
                    name, expert, base_pass.means, base_pass.statistics, base_pass.memory, format=str(skill.format)
                )
            )
    return sources
