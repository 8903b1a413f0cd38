"""An X-LoRA folder, ours or PEFT's, or a folder for the runtime, as a run of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from dylora_mlx.adapters.xlora import CLASSIFIER
from dylora_mlx.config import Config, DataConfig, GrowthConfig, LogConfig, ModelConfig, Source
from dylora_mlx.config.load import to_yaml
from dylora_mlx.data import stream
from dylora_mlx.errors import UserError
from dylora_mlx.exporting import formats
from dylora_mlx.exporting.folder import MANIFEST, read_arrays, read_manifest
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.growth.pool import Pool
from dylora_mlx.importing import adapters
from dylora_mlx.importing.common import add_frozen_expert, check_base, log_import, parse_source
from dylora_mlx.model.base import device
from dylora_mlx.model.base.load import Base, load_base
from dylora_mlx.model.routing.router import GateRow
from dylora_mlx.run.build import make_decoder
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.system import console
from dylora_mlx.system.files import atomic_folder, check_run_parent, read_json, write_error
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint.state import pool_files
from dylora_mlx.training.skill.base_pass import run_base_pass

NEVER_CHOSEN = -1e9
"""Bias of a gate row whose gate is zero for every token."""


class ImportedMixture(NamedTuple):
    """An X-LoRA folder, read: experts by column, None for one that changes nothing; the gate's rows; experts a token; how
    its skills' data are split."""

    experts: list[adapters.ForeignAdapter | None]
    names: list[str]
    skills: list[list[str]]
    weight: mx.array
    bias: mx.array
    top_k: int | None
    router_layer: int | str
    document_mean_weight: float
    base: str
    fingerprint: str
    projections: list[str]
    sources: dict[str, Source]
    data: DataConfig
    seed: int


def import_mixture(place: Path, out: Path, base: str | None, texts: Sequence[Source]) -> OpenedRun:
    """Make a run of an X-LoRA folder, ours or PEFT's, or of a folder for the runtime.

    texts: what its skills read like, in the adapters' order where the folder does not say; needed to import more experts
    later. Raises UserError for what our routing cannot be, a base that is not there, or a run that is.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; choose another --name")
    check_run_parent(out)
    found = read_mixture(place, texts)
    if not (base or found.base):
        raise UserError(f"{place}: does not say what its base is; give it with --base")
    device.set_memory_limits()
    loaded = load_base(base or found.base, "auto")
    if found.fingerprint not in ("", loaded.fingerprint):
        raise UserError(f"{place}: these experts were trained on another base than {loaded.name} ({found.base})")
    check_base(found.base, loaded, place, bool(found.fingerprint) or base is not None)
    _check_sizes(found, loaded, place)
    config = _config(found, loaded, place)
    model = make_decoder(config, loaded)
    pool, library = Pool(model), Library(loaded.fingerprint)
    for expert_id, adapter in enumerate(found.experts):
        if adapter is not None:
            add_frozen_expert(
                pool, adapters.to_expert(adapter, model.shapes, place / str(expert_id)), found.names[expert_id]
            )
    _rows(model.router.rows, found)
    _remember(found, {text.name for text in texts}, config, loaded, pool, library)
    try:
        with atomic_folder(out) as temporary:
            (temporary / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
            checkpoint.write(temporary / "checkpoints" / "final", pool_files(loaded, pool, library))
    except (OSError, RuntimeError) as error:  # MLX raises the second kind
        raise write_error(out, error, "choose another --out") from error
    for expert_id, record in enumerate(pool.records, 1):
        log_import(out, record.skill, expert_id, place)
    return OpenedRun(config, loaded, model, pool, library, out / "checkpoints" / "final")


def read_mixture(place: Path, texts: Sequence[Source]) -> ImportedMixture:
    """An X-LoRA folder. Raises UserError for a part that our routing does not have, or a damaged file."""
    if not place.is_dir():
        raise UserError(f"{place}: no such folder; give a mixture's folder or a hub id such as OWNER/NAME")
    said = read_manifest(place) if (place / MANIFEST).is_file() else {}
    if said and said.get("kind") not in ("xlora", "runtime"):
        raise UserError(
            f"{place}: a '{said.get('kind')}' export, not a mixture; experts come in by dylora import-expert"
        )
    config = _xlora_options(place) if said.get("kind") != "runtime" else {}
    gate = read_arrays(place / "adapter_model.safetensors")
    for name in gate.keys() ^ {f"{CLASSIFIER}weight", f"{CLASSIFIER}bias"}:
        raise UserError(f"{place / 'adapter_model.safetensors'}: '{name}' is {_wrong(name, gate)}")
    weight, bias = (gate[f"{CLASSIFIER}{part}"].astype(mx.float32) for part in ("weight", "bias"))
    if config.get("enable_softmax", bool(config)) and "softmax_temperature" in config:
        temperature = float(adapters.positive_number(config, "softmax_temperature", place / adapters.CONFIG))
        weight, bias = weight / temperature, bias / temperature
    count = weight.shape[0] if weight.ndim else 0
    finite = mx.isfinite(weight).all().item() and mx.isfinite(bias).all().item()
    if weight.ndim != 2 or bias.shape != (count,) or not finite:
        raise UserError(f"{place / 'adapter_model.safetensors'}: not a finite linear classifier")
    for part, expert_ids in (("adapters", config.get("adapters")), ("experts", said.get("experts"))):
        if expert_ids is not None and (not isinstance(expert_ids, list | dict) or len(expert_ids) != count):
            raise UserError(f"{place}: its {part} are not as many as the {count} columns of the classifier")
    read = [adapters.read_adapter(place / str(expert_id)) for expert_id in range(count)]
    null = next((expert_id for expert_id, adapter in enumerate(read) if _is_null(adapter)), None)
    experts = [None if expert_id == null else adapter for expert_id, adapter in enumerate(read)]
    try:
        names, skills, sources = _described(said, experts, texts, place)
        top_k = said["top_k"] if said else config.get("top_k_lora")
        stated = said["base"]["name"] if said else str(config.get("base_model_name_or_path") or "")
        known, tap = said["base"]["fingerprint"] if said else "", said.get("router_layer", "final")
        context = float(said.get("document_mean_weight", 0.0))
        splits = dict(said.get("splits", {}))
        seed, data = int(splits.pop("seed", 0)), DataConfig(**splits)
        if top_k is not None and (type(top_k) is not int or top_k < 1):
            raise ValueError(f"top_k {top_k!r:.80}")
        if not all(isinstance(name, str) for name in (stated, known, *names, *(s for held in skills for s in held))):
            raise TypeError("a name that is no text")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{place}: does not describe a mixture ({error})") from error
    used = {path.rsplit(".", 1)[1] for adapter in read for path in adapter.factors}
    order = said.get("projections") or sorted(used)
    return ImportedMixture(
        experts, names, skills, weight, bias, top_k, tap, context, stated, known, order, sources, data, seed
    )


def _check_sizes(found: ImportedMixture, base: Base, place: Path) -> None:
    dims, layers = base.args.hidden_size, base.args.num_hidden_layers
    if found.weight.shape[1] != dims:
        raise UserError(
            f"{place}: its gate reads states of {found.weight.shape[1]} numbers, {base.name} has {dims}: it belongs to another base"
        )
    if found.router_layer != "final" and (
        not isinstance(found.router_layer, int) or not 0 <= found.router_layer < layers
    ):
        raise UserError(
            f"{place}: its router reads layer {found.router_layer}, but {base.name} has layers 0 to {layers - 1}"
        )


def _wrong(name: str, gate: Mapping[str, mx.array]) -> str:
    return "not a linear classifier's, xlora_depth must be 1" if name in gate else "missing"


def _xlora_options(place: Path) -> dict[str, Any]:
    """adapter_config.json of a mixture that ours can be: a linear classifier, gates that sum to one, the base read alone."""
    where = place / adapters.CONFIG
    config = read_json(where)
    if config.get("peft_type") != "XLORA":
        raise UserError(f"{where}: peft_type {config.get('peft_type')!r}, not an X-LoRA mixture")
    dense, sparse = bool(config.get("enable_softmax", True)), bool(config.get("enable_softmax_topk"))
    top_k = config.get("top_k_lora")
    wrong = {
        "xlora_depth": config.get("xlora_depth", 1) != 1,
        "layerwise_scalings": bool(config.get("layerwise_scalings")),
        "scaling_pass_value": config.get("scaling_pass_value", 0.0) != 0,
        "global_scaling_weight": config.get("global_scaling_weight", 1.0) != 1,
        "enable_softmax": dense == sparse,
        "top_k_lora": (top_k is None) == sparse,
    }
    for name, bad in wrong.items():
        if bad:
            raise UserError(
                f"{where}: {name} {config.get(name)!r}: a run has one linear gate for all layers, softmax over all experts or "
                "over the k largest (enable_softmax_topk alone), and reads the base without adapters"
            )
    return config


def _is_null(adapter: adapters.ForeignAdapter) -> bool:
    return all(not b.any().item() for _, b in adapter.factors.values())


def _described(
    said: Mapping[str, Any], experts: Sequence[object], texts: Sequence[Source], place: Path
) -> tuple[list[str], list[list[str]], dict[str, Source]]:
    """Names of the columns, the skills that each holds, and where their text is."""
    given = {text.name: text for text in texts}
    if said:
        expert_ids = said["experts"]
        base_skill = [said["base_skill"]] if said["base_skill"] is not None else []
        sources = {options["name"]: parse_source(options) for options in (*base_skill, *said["sources"])}
        return [c["name"] for c in expert_ids], [list(c["skills"]) for c in expert_ids], sources | given
    real = [expert_id for expert_id, expert in enumerate(experts) if expert is not None]
    if len(given) != len(real):
        raise UserError(
            f"{place}: this folder does not say what its {len(real)} experts are for; name each, in their order, with "
            "--text NAME=SOURCE"
        )
    names = [formats.NULL_EXPERT] * len(experts)
    for expert_id, name in zip(real, given, strict=True):
        names[expert_id] = name
    return names, [[name] if name != formats.NULL_EXPERT else [] for name in names], given


def _config(found: ImportedMixture, base: Base, place: Path) -> Config:
    real = [adapter for adapter in found.experts if adapter is not None]
    if not real:
        raise UserError(f"{place}: no adapter of this mixture changes anything")
    known = next((s for c, s in enumerate(found.skills) if found.experts[c] is None and s), [])
    sources = [source for name, source in found.sources.items() if name not in known]
    base_skill = found.sources.get(known[0]) if known else None
    expert_ids = len(real)
    try:
        growth = GrowthConfig(top_k=found.top_k or expert_ids + 1, final_temperature=1.0, base_skill=base_skill)
        read: dict[str, Any] = {"router_layer": found.router_layer, "document_mean_weight": found.document_mean_weight}
        model = ModelConfig(base=base.name, projections=list(found.projections), **read)
        return Config(skills=sources, seed=found.seed, model=model, growth=growth, data=found.data, log=LogConfig())
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}: what it says of itself makes no run ({error})") from error


def _rows(rows: list[GateRow], found: ImportedMixture) -> None:
    """The gate's rows: the mixture's own, with one that is never chosen where no column is the base's."""
    expert_ids = [c for c, adapter in enumerate(found.experts) if adapter is not None]
    null = next((c for c, adapter in enumerate(found.experts) if adapter is None), None)
    if null is None:
        rows[0].bias = mx.array([NEVER_CHOSEN])
    else:
        rows[0].weight, rows[0].bias = found.weight[null], found.bias[null : null + 1]
    for row, expert_id in zip(rows[1:], expert_ids, strict=True):
        row.weight, row.bias = found.weight[expert_id], found.bias[expert_id : expert_id + 1]


def _remember(
    found: ImportedMixture, given: Collection[str], config: Config, base: Base, pool: Pool, library: Library
) -> None:
    """What a run remembers of its skills, from their text where that is at hand. given: skills whose text was named now."""
    place = {name: expert_id for expert_id, name in enumerate([formats.NULL_EXPERT, *(r.skill for r in pool.records)])}
    for expert_id, held in enumerate(found.skills):
        for name in held:
            source = found.sources.get(name)
            try:
                # Of a local file an export has the name only: another of that name is not it.
                if source is None or ("/" not in source.source and name not in given):
                    raise UserError("its text is not on this machine")
                skill = stream.prepare_skill(source, config.data, base.tokenizer, config.seed)
            except UserError as error:
                console.warn(f"{name}: nothing of it is remembered ({error}); name its text with --text {name}=SOURCE")
                continue
            studied = run_base_pass(pool.model, skill, config)
            owner = place.get(found.names[expert_id], 0) if found.experts[expert_id] is not None else 0
            library.add(LibraryEntry(name, owner, studied.means, studied.statistics, studied.memory))
