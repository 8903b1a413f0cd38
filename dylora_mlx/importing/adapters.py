"""LoRA adapters of others, read into one expert: PEFT's folders and mlx-lm's. What cannot be held is named, not dropped."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from dylora_mlx.adapters.mlx_lm import module_path
from dylora_mlx.errors import UserError
from dylora_mlx.exporting.folder import read_arrays
from dylora_mlx.model.experts.lora import Expert, Shapes
from dylora_mlx.system.files import is_number, read_json

CONFIG = "adapter_config.json"
PEFT_KEY = re.compile(r"base_model\.model\.(model\.layers\.\d+\.\w+\.\w+)\.lora_([AB])\.weight")
MLX_KEY = re.compile(r"(model\.layers\.\d+\.\w+\.\w+)\.lora_([ab])")
PLAIN = {"use_dora": "DoRA", "lora_bias": "LoRA biases", "layer_replication": "layer replication",
         "modules_to_save": "modules saved whole", "fan_in_fan_out": "fan_in_fan_out weights",
         "trainable_token_indices": "trained tokens", "target_parameters": "target_parameters",
         "alora_invocation_tokens": "aLoRA", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA", "arrow_config": "Arrow's routing",
         "kasa_config": "KaSA", "monteclora_config": "MonteCLoRA"}  # fmt: skip
"""Parts of a PEFT LoRA that an expert cannot hold, where they are set."""
SCALES = (1e-30, 1e30)
"""Between these float32 has room for alpha / rank and for what it scales."""
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How an adapter may begin that changes the base beside it, by the beginning of init_lora_weights."""


class ForeignAdapter(NamedTuple):
    """base: what it says it was trained on, empty if nothing; factors: a [inputs, r] and b [r, outputs] by module path;
    scales: alpha / r by module path; rank, alpha: what most of its modules have."""

    base: str
    factors: dict[str, tuple[mx.array, mx.array]]
    scales: dict[str, float]
    rank: int
    alpha: float


def read_adapter(folder: Path) -> ForeignAdapter:
    """A PEFT LoRA folder, or an mlx-lm adapter. Raises UserError for another kind, a part that an expert cannot hold, or
    a damaged file."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give an adapter's folder or a hub id such as OWNER/NAME")
    config = read_json(folder / CONFIG)
    if "peft_type" in config:
        return _peft(folder, config)
    if "fine_tune_type" in config or "lora_parameters" in config:
        return _mlx_lm(folder, config)
    raise UserError(f"{folder / CONFIG}: neither a PEFT nor an mlx-lm adapter (no peft_type, no fine_tune_type)")


def to_expert(adapter: ForeignAdapter, shapes: Shapes, where: Path) -> Expert:
    """An adapter as an expert of these shapes: modules that it leaves out are zero, smaller ranks are filled with zeros.

    Raises UserError for a module that experts of this run do not have, and for one of another size.
    """
    there = {module_path(layer, name): (layer, name) for layer, named in shapes.items() for name in named}
    for path in adapter.factors:
        if path not in there:
            held = sorted({name for named in shapes.values() for name in named})
            raise UserError(
                f"{where}: '{path}' is adapted, but experts of this run are on {', '.join(held)} of layers {min(shapes)} to "
                f"{max(shapes)}"
            )
    # Not the rank that is said: where no module has it, it would only be a size to fill with zeros.
    rank = max(a.shape[1] for a, _ in adapter.factors.values())
    common = adapter.alpha / adapter.rank
    if not SCALES[0] < common < SCALES[1]:
        raise UserError(f"{where}: a scale of {common:g} (alpha / rank) is beyond float32")
    alpha = adapter.alpha if rank == adapter.rank else common * rank
    made = Expert(shapes, rank, alpha, mx.random.key(0))
    for path, (layer, name) in there.items():
        own, (inputs, outputs) = made.layers[layer][name], shapes[layer][name]
        a, b = adapter.factors.get(path, (mx.zeros((inputs, rank)), mx.zeros((rank, outputs))))
        if a.shape[0] != inputs or b.shape[1] != outputs:
            raise UserError(
                f"{where}: '{path}' has {a.shape[0]} inputs and {b.shape[1]} outputs, the base's has {inputs} and {outputs}: "
                "this adapter belongs to another base"
            )
        scale = adapter.scales.get(path, common)
        b = b if scale == common else b * (scale / common)
        missing = rank - a.shape[1]
        own.lora_a = mx.pad(a, [(0, 0), (0, missing)]) if missing else a
        own.lora_b = mx.pad(b, [(0, missing), (0, 0)]) if missing else b
        if not mx.isfinite(own.lora_b * made.scale).all().item():
            raise UserError(
                f"{where}: '{path}' is scaled beyond float32 (alpha {adapter.alpha:g}, rank {adapter.rank})"
            )
    mx.eval(made.parameters())
    return made


def _peft(folder: Path, config: dict[str, Any]) -> ForeignAdapter:
    kind, where = config["peft_type"], folder / CONFIG
    if kind == "XLORA":
        raise UserError(f"{where}: an X-LoRA mixture; it is a whole run, use dylora import-run")
    if kind != "LORA":
        raise UserError(f"{where}: a {kind} adapter, only LoRA ones can be experts")
    for name, part in PLAIN.items():
        if config.get(name):
            raise UserError(f"{where}: {part} ({name}) cannot be part of an expert")
    if config.get("bias", "none") != "none":
        raise UserError(f"{where}: trained biases (bias: {config['bias']}) cannot be part of an expert")
    if str(config.get("init_lora_weights")).startswith(BASE_CHANGING_INITS):
        raise UserError(
            f"{where}: init_lora_weights {config['init_lora_weights']}: this adapter belongs to a base that was changed beside "
            "it; convert it to a plain one with PEFT (path_initial_model_for_weight_conversion)"
        )
    if not (folder / "adapter_model.safetensors").is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(
            f"{folder}: adapter_model.bin is a pickle, which is never opened; save it as safetensors with PEFT"
        )
    rank, alpha = positive_number(config, "r", where), positive_number(config, "lora_alpha", where)
    if rank != int(rank):
        raise UserError(f"{where}: r is {rank!r}, not a whole number")
    found = _factors(folder / "adapter_model.safetensors", PEFT_KEY, ("A", "B"))
    factors = {path: (mx.contiguous(a.T), mx.contiguous(b.T)) for path, (a, b) in found.items()}
    ranks, alphas = (_pattern(config, name, where) for name in ("rank_pattern", "alpha_pattern"))
    scales = {}
    for path, (a, _) in factors.items():
        own_rank, own_alpha = _of(ranks, path, rank, where), _of(alphas, path, alpha, where)
        if own_rank != a.shape[1]:
            raise UserError(f"{folder}: '{path}' has rank {a.shape[1]}, {CONFIG} says {own_rank:g}")
        scales[path] = own_alpha / (math.sqrt(own_rank) if config.get("use_rslora") else own_rank)
    if config.get("use_rslora"):
        alpha = alpha * math.sqrt(rank)
    return ForeignAdapter(str(config.get("base_model_name_or_path") or ""), factors, scales, int(rank), float(alpha))


def _mlx_lm(folder: Path, config: dict[str, Any]) -> ForeignAdapter:
    where, kind = folder / CONFIG, config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise UserError(f"{where}: fine_tune_type {kind}, only lora can be an expert")
    options = config.get("lora_parameters")
    if not isinstance(options, dict):
        raise UserError(f"{where}: lora_parameters are missing")
    scale = positive_number(options, "scale", where)
    factors = _factors(folder / "adapters.safetensors", MLX_KEY, ("a", "b"))
    rank = max(a.shape[1] for a, _ in factors.values())
    return ForeignAdapter(str(config.get("model") or ""), factors, dict.fromkeys(factors, scale), rank, scale * rank)


def _factors(path: Path, key: re.Pattern[str], letters: tuple[str, str]) -> dict[str, tuple[mx.array, mx.array]]:
    """Pairs of factors by module path, float32; raises UserError for any other weight in the file."""
    halves: dict[str, dict[str, mx.array]] = {}
    for name, value in read_arrays(path).items():
        match = key.fullmatch(name)
        if match is None:
            raise UserError(f"{path}: '{name}' {_part(name)}, which an expert cannot hold")
        if value.ndim != 2 or not mx.isfinite(value.astype(mx.float32)).all().item():
            raise UserError(f"{path}: '{name}' is not a finite matrix")
        halves.setdefault(match[1], {})[match[2]] = value.astype(mx.float32)
    if not halves:
        raise UserError(f"{path}: holds no LoRA weight")
    for module, found in halves.items():
        if missing := set(letters) - found.keys():
            raise UserError(f"{path}: '{module}' has no lora_{missing.pop()}")
        first, second = (found[letter] for letter in letters)
        if (first.shape[0] if letters[0] == "A" else first.shape[1]) != second.shape[1 if letters[0] == "A" else 0]:
            raise UserError(f"{path}: '{module}' has factors of different ranks")
        if not first.size or not second.size:
            raise UserError(f"{path}: '{module}' has an empty factor")
    return {module: (found[letters[0]], found[letters[1]]) for module, found in halves.items()}


def _part(name: str) -> str:
    parts = {"lora_magnitude": "is DoRA's", ".m": "is DoRA's", "lora_embedding": "adapts the embedding", "embed_tokens":
             "belongs to the embedding", "lm_head": "belongs to the head", "bias": "is a bias"}  # fmt: skip
    for mark, part in parts.items():
        if mark in name if mark != ".m" else name.endswith(mark):
            return part
    return "is no LoRA factor of a projection in a layer"


def positive_number(options: dict[str, Any], name: str, where: Path) -> float:
    """An option above 0. Raises UserError for anything else."""
    value = options.get(name)
    if not is_number(value) or value <= 0:
        raise UserError(f"{where}: {name} is {value!r:.80}, not a number above 0")
    return value


def _pattern(config: dict[str, Any], name: str, where: Path) -> dict[str, Any]:
    """Numbers by module, as PEFT's rank_pattern has them."""
    found = config.get(name) or {}
    if not isinstance(found, dict):
        raise UserError(f"{where}: {name} is {found!r:.80}, not an object of modules and numbers")
    return found


def _of(patterns: dict[str, Any], path: str, default: float, where: Path) -> float:
    """A module's own rank or alpha, by its name or the end of it. PEFT would take any regular expression; one that came
    with a file is not run."""
    for pattern in patterns:
        name = pattern.removeprefix("^").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", name):
            raise UserError(f"{where}: '{pattern}' is a regular expression; write out the modules' names")
        if path == name or (name == pattern.replace("\\.", ".") and path.endswith(f".{name}")):
            return positive_number(patterns, pattern, where)
    return default
