"""An X-LoRA folder, ours or PEFT's, or a folder for the runtime, as a run of its own."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from dylora_mlx.adapters.xlora import CLASSIFIER
from dylora_mlx.cli import options as cli
from dylora_mlx.cli import parser as commands
from dylora_mlx.config import Config, Data, Growth, Log, Model, Source
from dylora_mlx.data import stream
from dylora_mlx.errors import UserError
from dylora_mlx.exporting import folder, formats
from dylora_mlx.growth.library import Entry, Library
from dylora_mlx.growth.pool import Pool
from dylora_mlx.importing import adapters
from dylora_mlx.importing import common as adoption
from dylora_mlx.model.base import device
from dylora_mlx.model.base import load as bases
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.routing.router import GateRow
from dylora_mlx.run import build as assembly
from dylora_mlx.run.folder import Opened
from dylora_mlx.system import console
from dylora_mlx.system.files import read_json, unwritten
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint import state as states
from dylora_mlx.training.skill import base_pass as study

NEVER = -1e9
"""Bias of a gate row whose gate is zero for every token."""


class Mixture(NamedTuple):
    """An X-LoRA folder, read: experts by column, None for one that changes nothing; the gate's rows; experts a token; how
    its skills' data are split."""

    experts: list[adapters.Adapter | None]
    names: list[str]
    skills: list[list[str]]
    weight: mx.array
    bias: mx.array
    top_k: int | None
    tap: int | str
    context: float
    base: str
    fingerprint: str
    projections: list[str]
    sources: dict[str, Source]
    data: Data
    seed: int


def adopt(place: Path, out: Path, base: str | None, texts: Sequence[Source]) -> Opened:
    """Make a run of an X-LoRA folder, ours or PEFT's, or of a folder for the runtime.

    texts: what its skills read like, in the adapters' order where the folder does not say; needed to import more experts
    later. Raises UserError for what our routing cannot be, a base that is not there, or a run that is.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; choose another --name")
    commands.check_place(out)
    found = read_mixture(place, texts)
    if not (base or found.base):
        raise UserError(f"{place}: does not say what its base is; give it with --base")
    device.prepare()
    loaded = bases.load(base or found.base, "auto")
    if found.fingerprint not in ("", loaded.fingerprint):
        raise UserError(f"{place}: these experts were trained on another base than {loaded.name} ({found.base})")
    adoption.check_base(found.base, loaded, place, bool(found.fingerprint) or base is not None)
    _check_sizes(found, loaded, place)
    config = _config(found, loaded, place)
    model = assembly.routed(config, loaded)
    pool, library = Pool(model), Library(loaded.fingerprint)
    for column, adapter in enumerate(found.experts):
        if adapter is not None:
            adoption.join(pool, adapters.expert(adapter, model.shapes, place / str(column)), found.names[column])
    _rows(model.router.rows, found)
    _remember(found, {text.name for text in texts}, config, loaded, pool, library)
    try:
        out.mkdir(parents=True)
        try:
            (out / "config.yaml").write_text(cli.as_yaml(config), encoding="utf-8")
            files = states.pool_files(loaded, pool, library)
            checkpoint.write(out / "checkpoints" / "final", files)
        except BaseException:
            shutil.rmtree(out, ignore_errors=True)
            raise
    except (OSError, RuntimeError) as error:  # MLX raises the second kind
        raise unwritten(out, error, "choose another --out") from error
    for column, record in enumerate(pool.records, 1):
        adoption.note(out, record.skill, column, place)
    return Opened(config, loaded, model, pool, library, out / "checkpoints" / "final")


def read_mixture(place: Path, texts: Sequence[Source]) -> Mixture:
    """An X-LoRA folder. Raises UserError for a part that our routing does not have, or a damaged file."""
    if not place.is_dir():
        raise UserError(f"{place}: no such folder; give a mixture's folder or a hub id such as OWNER/NAME")
    said = folder.read_manifest(place) if (place / folder.MANIFEST).is_file() else {}
    if said and said.get("kind") not in ("xlora", "runtime"):
        raise UserError(
            f"{place}: a '{said.get('kind')}' export, not a mixture; experts come in by dylora import-expert"
        )
    config = _xlora_options(place) if said.get("kind") != "runtime" else {}
    gate = folder.read_arrays(place / "adapter_model.safetensors")
    for name in gate.keys() ^ {f"{CLASSIFIER}weight", f"{CLASSIFIER}bias"}:
        raise UserError(f"{place / 'adapter_model.safetensors'}: '{name}' is {_wrong(name, gate)}")
    weight, bias = (gate[f"{CLASSIFIER}{part}"].astype(mx.float32) for part in ("weight", "bias"))
    if config.get("enable_softmax", bool(config)) and "softmax_temperature" in config:
        temperature = float(adapters.number(config, "softmax_temperature", place / adapters.CONFIG))
        weight, bias = weight / temperature, bias / temperature
    count = weight.shape[0] if weight.ndim else 0
    finite = mx.isfinite(weight).all().item() and mx.isfinite(bias).all().item()
    if weight.ndim != 2 or bias.shape != (count,) or not finite:
        raise UserError(f"{place / 'adapter_model.safetensors'}: not a finite linear classifier")
    for part, columns in (("adapters", config.get("adapters")), ("experts", said.get("experts"))):
        if columns is not None and (not isinstance(columns, list | dict) or len(columns) != count):
            raise UserError(f"{place}: its {part} are not as many as the {count} columns of the classifier")
    read = [adapters.read(place / str(column)) for column in range(count)]
    null = next((column for column, adapter in enumerate(read) if _is_null(adapter)), None)
    experts = [None if column == null else adapter for column, adapter in enumerate(read)]
    try:
        names, skills, sources = _described(said, experts, texts, place)
        top_k = said["top_k"] if said else config.get("top_k_lora")
        stated = said["base"]["name"] if said else str(config.get("base_model_name_or_path") or "")
        known, tap = said["base"]["fingerprint"] if said else "", said.get("tap", "final")
        context = float(said.get("context", 0.0))
        splits = dict(said.get("splits", {}))
        seed, data = int(splits.pop("seed", 0)), Data(**splits)
        if top_k is not None and (type(top_k) is not int or top_k < 1):
            raise ValueError(f"top_k {top_k!r:.80}")
        if not all(isinstance(name, str) for name in (stated, known, *names, *(s for held in skills for s in held))):
            raise TypeError("a name that is no text")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{place}: does not describe a mixture ({error})") from error
    used = {path.rsplit(".", 1)[1] for adapter in read for path in adapter.factors}
    order = said.get("projections") or sorted(used)
    return Mixture(experts, names, skills, weight, bias, top_k, tap, context, stated, known, order, sources, data, seed)


def _check_sizes(found: Mixture, base: Base, place: Path) -> None:
    dims, layers = base.args.hidden_size, base.args.num_hidden_layers
    if found.weight.shape[1] != dims:
        raise UserError(
            f"{place}: its gate reads states of {found.weight.shape[1]} numbers, {base.name} has {dims}: it belongs to another base"
        )
    if found.tap != "final" and (not isinstance(found.tap, int) or not 0 <= found.tap < layers):
        raise UserError(f"{place}: its router taps layer {found.tap}, but {base.name} has layers 0 to {layers - 1}")


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


def _is_null(adapter: adapters.Adapter) -> bool:
    return all(not b.any().item() for _, b in adapter.factors.values())


def _described(
    said: Mapping[str, Any], experts: Sequence[object], texts: Sequence[Source], place: Path
) -> tuple[list[str], list[list[str]], dict[str, Source]]:
    """Names of the columns, the skills that each holds, and where their text is."""
    given = {text.name: text for text in texts}
    if said:
        columns = said["experts"]
        sources = {options["name"]: adoption.source(options) for options in (*said["known"], *said["sources"])}
        return [c["name"] for c in columns], [list(c["skills"]) for c in columns], sources | given
    real = [column for column, expert in enumerate(experts) if expert is not None]
    if len(given) != len(real):
        raise UserError(
            f"{place}: this folder does not say what its {len(real)} experts are for; name each, in their order, with "
            "--text NAME=SOURCE"
        )
    names = [formats.NULL] * len(experts)
    for column, name in zip(real, given, strict=True):
        names[column] = name
    return names, [[name] if name != formats.NULL else [] for name in names], given


def _config(found: Mixture, base: Base, place: Path) -> Config:
    real = [adapter for adapter in found.experts if adapter is not None]
    if not real:
        raise UserError(f"{place}: no adapter of this mixture changes anything")
    known = next((s for c, s in enumerate(found.skills) if found.experts[c] is None and s), [])
    sources = [source for name, source in found.sources.items() if name not in known]
    base_skill = found.sources.get(known[0]) if known else None
    columns = len(real)
    try:
        growth = Growth(final_top_k=found.top_k or columns + 1, final_temperature=1.0, base_skill=base_skill)
        read: dict[str, Any] = {"tap": found.tap, "context": found.context}
        model = Model(base=base.name, projections=list(found.projections), **read)
        return Config(skills=sources, seed=found.seed, model=model, growth=growth, data=found.data, log=Log())
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}: what it says of itself makes no run ({error})") from error


def _rows(rows: list[GateRow], found: Mixture) -> None:
    """The gate's rows: the mixture's own, with one that is never chosen where no column is the base's."""
    columns = [c for c, adapter in enumerate(found.experts) if adapter is not None]
    null = next((c for c, adapter in enumerate(found.experts) if adapter is None), None)
    if null is None:
        rows[0].bias = mx.array([NEVER])
    else:
        rows[0].weight, rows[0].bias = found.weight[null], found.bias[null : null + 1]
    for row, column in zip(rows[1:], columns, strict=True):
        row.weight, row.bias = found.weight[column], found.bias[column : column + 1]


def _remember(found: Mixture, given: Collection[str], config: Config, base: Base, pool: Pool, library: Library) -> None:
    """What a run remembers of its skills, from their text where that is at hand. given: skills whose text was named now."""
    place = {name: column for column, name in enumerate([formats.NULL, *(r.skill for r in pool.records)])}
    for column, held in enumerate(found.skills):
        for name in held:
            source = found.sources.get(name)
            try:
                # Of a local file an export has the name only: another of that name is not it.
                if source is None or ("/" not in source.source and name not in given):
                    raise UserError("its text is not on this machine")
                skill = stream.prepare(source, config.data, base.tokenizer, config.seed)
            except UserError as error:
                console.warn(f"{name}: nothing of it is remembered ({error}); name its text with --text {name}=SOURCE")
                continue
            studied = study.examine(pool.model, skill, config)
            owner = place.get(found.names[column], 0) if found.experts[column] is not None else 0
            library.add(Entry(name, owner, studied.means, studied.statistics, studied.memory))
