"""Read PEFT and mlx-lm LoRA adapters as experts.

An adapter with a part that an expert cannot represent is refused with the part's name; nothing is dropped silently.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from dylora_mlx.adapters.mlx_lm import module_path
from dylora_mlx.config import ATTENTION, MLP
from dylora_mlx.errors import UserError
from dylora_mlx.exporting.folder import read_arrays
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.experts.lora import Expert, Shapes
from dylora_mlx.model.kernels.quantized import weight_rows
from dylora_mlx.system.files import is_number, read_json

CONFIG = "adapter_config.json"
PROJECTIONS = (*ATTENTION, *MLP)
"""Names of the projections that experts can be on."""
_MODULE = r"((?:(?:model|language_model|module|_orig_mod)\.)*(layers\.(?:0|[1-9][0-9]{0,5})\.\w+\.\w+))"
"""A projection of a text layer, under any modules that wrap the text model.

A multimodal checkpoint has it in language_model, inside or around model; a headless model has no wrapper; DDP adds module
and torch.compile _orig_mod."""
PEFT_KEY = re.compile(rf"base_model\.model\.{_MODULE}\.lora_([AB])(?:\.default)?\.weight")
"""A factor in PEFT. The name of PEFT's default adapter is left in by tools that save without PEFT."""
MLX_KEY = re.compile(rf"{_MODULE}\.lora_([ab])")
"""A factor in mlx-lm and mlx-vlm."""
OTHER_MODELS = {"vision_tower": "the vision tower", "vision_model": "the vision tower", "visual": "the vision tower",
                "multi_modal_projector": "the projector of images", "embed_vision": "the projector of images",
                "audio_tower": "the audio tower", "embed_audio": "the projector of audio"}  # fmt: skip
"""Modules of a multimodal checkpoint beside its text model, with names for the message."""
MERGE = (
    "merge it with PEFT (merge_and_unload, then save_pretrained) and start a run on that folder (model.base), or train it "
    "without"
)
"""The way out for an adapter that PEFT can merge and that no LoRA equals."""
FUSE = "fuse it (mlx_lm.fuse) and start a run on that folder (model.base)"
"""The same for an adapter of mlx-lm."""
UNSUPPORTED_OPTIONS = {
    # PEFT's save_as_lora drops DoRA's magnitudes without a word (measured with 0.21), so it is no way out.
    "use_dora": ("DoRA", f"{MERGE} use_dora"),
    "velora_config": (
        "VeLoRA",
        "only its training differs, so PEFT's save_as_lora with the same rank makes an equal plain LoRA",
    ),
    "ensure_weight_tying": (
        "adapters that are tied",
        "if it adapts projections only, set it to false in adapter_config.json; else train it on projections only",
    ),
    "lora_bias": ("LoRA biases", f"{MERGE} lora_bias"),
    "layer_replication": ("layer replication", "train it without layer_replication"),
    "modules_to_save": ("modules saved whole", f"{MERGE} modules_to_save"),
    "fan_in_fan_out": ("fan_in_fan_out weights", "train it on a base with linear layers"),
    "trainable_token_indices": ("trained tokens", f"{MERGE} trainable_token_indices"),
    "target_parameters": ("target_parameters", "train it with target_modules"),
    "alora_invocation_tokens": ("aLoRA", "train it without alora_invocation_tokens"),
    "use_qalora": ("QALoRA", "train it without use_qalora"),
    "use_bdlora": ("BD-LoRA", "train it without use_bdlora"),
    "arrow_config": ("Arrow's routing", "import its adapters one by one"),
    "kasa_config": ("KaSA", "train it without kasa_config"),
    "monteclora_config": ("MonteCLoRA", "train it without monteclora_config"),
}
"""Options of a PEFT LoRA that an expert cannot represent when they are set: a name for the message, and the way out."""
EMBEDDINGS = re.compile(r"\.(embed_tokens|lm_head)\.")
"""The embedding or the head in a weight's name."""
SCALES = (1e-30, 1e30)
"""Accepted range of alpha / rank: float32 keeps room for the scale and the values that it multiplies."""
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Prefixes of init_lora_weights for initialisations that also change the base's weights."""


class Factors(NamedTuple):
    """The LoRA factors of one module."""

    name: str
    """The module's name in the adapter's own model, such as model.language_model.layers.0.self_attn.q_proj."""
    a: mx.array
    """The factor that is multiplied with the inputs, float32, in the layout of its file."""
    b: mx.array
    """The factor that gives the outputs, float32, in the layout of its file."""


class ForeignAdapter(NamedTuple):
    """A LoRA adapter that was trained elsewhere."""

    base: str
    """Name or folder of the base it was trained on; empty if its config does not name one."""
    factors: dict[str, tuple[mx.array, mx.array]]
    """LoRA factors by module path: a [inputs, r] and b [r, outputs], float32."""
    scales: dict[str, float]
    """Scale by module path: alpha / r, or alpha / sqrt(r) for rsLoRA."""
    rank: int
    """Default rank of its modules; for mlx-lm the largest one."""
    alpha: float
    """Alpha that with `rank` gives the default scale, alpha / rank."""


def read_adapter(folder: Path, base: Base | None = None) -> ForeignAdapter:
    """Read a PEFT LoRA folder or an mlx-lm adapter folder.

    Args:
        folder: the adapter's folder.
        base: the run's base. PEFT may save its embedding or head too (save_embedding_layers): an unchanged copy is left
            out. None: any copy is refused.

    Raises UserError for another kind of adapter, a part that an expert cannot represent, or a damaged file.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give an adapter's folder or a hub id such as OWNER/NAME")
    config = read_json(folder / CONFIG)
    if "peft_type" in config:
        return _read_peft(folder, config, base)
    if "fine_tune_type" in config or "lora_parameters" in config:
        return _read_mlx_lm(folder, config)
    raise UserError(f"{folder / CONFIG}: neither a PEFT nor an mlx-lm adapter (no peft_type, no fine_tune_type)")


def to_expert(adapter: ForeignAdapter, shapes: Shapes, location: Path) -> Expert:
    """Convert an adapter to an expert. Modules that it lacks are zero; smaller ranks are padded with zeros.

    Args:
        adapter: the adapter.
        shapes: the projections that an expert of this run adapts.
        location: the adapter's folder, for messages.

    Raises UserError for a module that experts of this run do not have, a module of another size, or a scale that
    float32 cannot hold.
    """
    layer_and_name = {module_path(layer, name): (layer, name) for layer, named in shapes.items() for name in named}
    _check_modules(adapter, shapes, location)
    # The largest rank in use, not the configured one: if no module had that, it would only add zero padding.
    rank = max(a.shape[1] for a, _ in adapter.factors.values())
    common_scale = adapter.alpha / adapter.rank
    if not SCALES[0] < common_scale < SCALES[1]:
        raise UserError(f"{location}: a scale of {common_scale:g} (alpha / rank) is beyond float32")
    alpha = adapter.alpha if rank == adapter.rank else common_scale * rank
    expert = Expert(shapes, rank, alpha, mx.random.key(0))
    for path, (layer, name) in layer_and_name.items():
        factors, (inputs, outputs) = expert.layers[layer][name], shapes[layer][name]
        a, b = adapter.factors.get(path, (mx.zeros((inputs, rank)), mx.zeros((rank, outputs))))
        if a.shape[0] != inputs or b.shape[1] != outputs:
            raise UserError(
                f"{location}: '{path}' has {a.shape[0]} inputs and {b.shape[1]} outputs, the base's has {inputs} and {outputs}: "
                "this adapter belongs to another base"
            )
        # An expert has one scale for all modules, so a module's own scale goes into b.
        scale = adapter.scales.get(path, common_scale)
        b = b if scale == common_scale else b * (scale / common_scale)
        missing_rank = rank - a.shape[1]
        factors.lora_a = mx.pad(a, [(0, 0), (0, missing_rank)]) if missing_rank else a
        factors.lora_b = mx.pad(b, [(0, missing_rank), (0, 0)]) if missing_rank else b
        if not mx.isfinite(factors.lora_b * expert.scale).all().item():
            raise UserError(
                f"{location}: '{path}' is scaled beyond float32 (alpha {adapter.alpha:g}, rank {adapter.rank})"
            )
    mx.eval(expert.parameters())
    return expert


def _check_modules(adapter: ForeignAdapter, shapes: Shapes, location: Path) -> None:
    """Check that experts of these shapes have every module of an adapter.

    Raises UserError that names the module, and the option whose other value would fit: model.projections or
    model.router_layer.
    """
    projections = {name for named in shapes.values() for name in named}
    names = {path: path.rsplit(".", 1)[1] for path in adapter.factors}
    known_paths = {module_path(0, name).removeprefix("model.layers.0.") for name in PROJECTIONS}
    for path, name in names.items():
        layer, module = path.removeprefix("model.layers.").split(".", 1)
        if name in shapes.get(int(layer), {}) and module in known_paths:
            continue
        problem = (
            f"{location}: '{path}' is adapted, but experts of this run are on {', '.join(sorted(projections))} of layers {min(shapes)} to "
            f"{max(shapes)}"
        )
        if module not in known_paths:
            raise UserError(f"{problem}; no expert can be on {module}, only on {', '.join(PROJECTIONS)}")
        if name not in projections:
            needed = ", ".join(known for known in PROJECTIONS if known in projections or known in names.values())
            raise UserError(
                f"{problem}; this adapter needs model.projections [{needed}]. That is set when a run starts: import into a run that "
                f"was trained with --model.projections '[{needed}]'"
            )
        if int(layer) < min(shapes):
            lowest = min(int(path.split(".")[2]) for path in names)
            raise UserError(
                f"{problem}; this adapter needs model.router_layer final, or at most {lowest}. That is set when a run starts: import "
                "into a run that was trained with --model.router_layer final"
            )
        raise UserError(f"{problem}: this adapter belongs to another base")


def _read_peft(folder: Path, config: dict[str, Any], base: Base | None) -> ForeignAdapter:
    kind, config_path = config["peft_type"], folder / CONFIG
    if kind == "XLORA":
        raise UserError(f"{config_path}: an X-LoRA mixture; it is a whole run, use dylora import-run")
    if kind != "LORA":
        raise UserError(
            f"{config_path}: a {kind} adapter, only LoRA ones can be experts; PEFT's save_as_lora converts those that add a "
            "matrix to the weights, such as LoHa and LoKr"
        )
    for name, (part, way_out) in UNSUPPORTED_OPTIONS.items():
        if config.get(name):
            raise UserError(f"{config_path}: {part} ({name}) cannot be part of an expert; {way_out}")
    if config.get("bias", "none") != "none":
        raise UserError(
            f"{config_path}: trained biases (bias: {config['bias']}) cannot be part of an expert; {MERGE} bias"
        )
    if str(config.get("init_lora_weights")).startswith(BASE_CHANGING_INITS):
        raise UserError(
            f"{config_path}: init_lora_weights {config['init_lora_weights']}: this adapter belongs to a base that was changed at "
            "initialisation; convert it to a plain LoRA with PEFT (path_initial_model_for_weight_conversion)"
        )
    if not (folder / "adapter_model.safetensors").is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(
            f"{folder}: adapter_model.bin is a pickle, which is never opened; save it as safetensors with PEFT"
        )
    rank, alpha = positive_number(config, "r", config_path), positive_number(config, "lora_alpha", config_path)
    if rank != int(rank):
        raise UserError(f"{config_path}: r is {rank!r}, not a whole number")
    modules = _read_factors(folder / "adapter_model.safetensors", PEFT_KEY, ("A", "B"), base)
    factors = {path: (mx.contiguous(module.a.T), mx.contiguous(module.b.T)) for path, module in modules.items()}
    ranks, alphas = (_pattern(config, name, config_path) for name in ("rank_pattern", "alpha_pattern"))
    scales = {}
    for path, (a, _) in factors.items():
        module_rank, module_alpha = (
            _module_value(ranks, modules[path].name, rank, config_path),
            _module_value(alphas, modules[path].name, alpha, config_path),
        )
        if module_rank != a.shape[1]:
            raise UserError(f"{folder}: '{path}' has rank {a.shape[1]}, {CONFIG} says {module_rank:g}")
        scales[path] = module_alpha / (math.sqrt(module_rank) if config.get("use_rslora") else module_rank)
    if config.get("use_rslora"):
        alpha = alpha * math.sqrt(rank)
    return ForeignAdapter(str(config.get("base_model_name_or_path") or ""), factors, scales, int(rank), float(alpha))


def _read_mlx_lm(folder: Path, config: dict[str, Any]) -> ForeignAdapter:
    config_path, kind = folder / CONFIG, config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise UserError(f"{config_path}: fine_tune_type {kind}, only lora can be an expert; {FUSE}")
    options = config.get("lora_parameters")
    if not isinstance(options, dict):
        raise UserError(f"{config_path}: lora_parameters are missing")
    scale = positive_number(options, "scale", config_path)
    modules = _read_factors(folder / "adapters.safetensors", MLX_KEY, ("a", "b"))
    factors = {path: (module.a, module.b) for path, module in modules.items()}
    rank = max(a.shape[1] for a, _ in factors.values())
    return ForeignAdapter(str(config.get("model") or ""), factors, dict.fromkeys(factors, scale), rank, scale * rank)


def _read_factors(
    path: Path, key: re.Pattern[str], letters: tuple[str, str], base: Base | None = None
) -> dict[str, Factors]:
    """Read the LoRA factors by module path, as in model.layers.0.self_attn.q_proj.

    Factors of a vision tower, its projector, the embedding or the head are left out where they change nothing: one of
    the two is zero, as PEFT starts it. So is an unchanged copy of the base's embedding or head.

    Args:
        path: a safetensors file.
        key: pattern of a factor's name; its groups are the module's name, that name below the text model, and the
            factor's letter.
        letters: letters of the two factors. PEFT's "A" and "B" are transposed against mlx-lm's "a" and "b".
        base: the run's base, to find copies of its weights.

    Raises UserError for any other weight in the file, and for a module that the file has twice.
    """
    arrays = read_arrays(path)
    factors_of: dict[str, dict[str, mx.array]] = {}
    names: dict[str, str] = {}
    for name, value in arrays.items():
        match = key.fullmatch(name)
        if match is None:
            if _changes_nothing(name, arrays) or _is_copy(name, value, base):
                continue
            way_out = f"{MERGE} this module" if letters[0] == "A" else FUSE
            advice = "train the adapter on the text layers only" if _other_model(name) else way_out
            raise UserError(f"{path}: '{name}' {_describe_weight(name)}, which an expert cannot hold; {advice}")
        if value.ndim != 2 or not mx.isfinite(value.astype(mx.float32)).all().item():
            raise UserError(f"{path}: '{name}' is not a finite matrix")
        module = f"model.{match[2]}"
        if names.setdefault(module, match[1]) != match[1] or match[3] in factors_of.get(module, {}):
            raise UserError(f"{path}: '{name}' is a second adapter of '{module}'; keep one")
        factors_of.setdefault(module, {})[match[3]] = value.astype(mx.float32)
    if not factors_of:
        raise UserError(f"{path}: holds no LoRA weight of a text layer")
    for module, factors in factors_of.items():
        if missing := set(letters) - factors.keys():
            raise UserError(f"{path}: '{module}' has no lora_{missing.pop()}")
        first, second = (factors[letter] for letter in letters)
        if (first.shape[0] if letters[0] == "A" else first.shape[1]) != second.shape[1 if letters[0] == "A" else 0]:
            raise UserError(f"{path}: '{module}' has factors of different ranks")
        if not first.size or not second.size:
            raise UserError(f"{path}: '{module}' has an empty factor")
    return {
        module: Factors(names[module], factors[letters[0]], factors[letters[1]])
        for module, factors in factors_of.items()
    }


def _other_model(name: str) -> str:
    """Return the part of a multimodal checkpoint beside the text model that a weight belongs to; empty for none."""
    return next((OTHER_MODELS[part] for part in name.split(".") if part in OTHER_MODELS), "")


def _changes_nothing(name: str, arrays: Mapping[str, mx.array]) -> bool:
    """Return whether a weight is a LoRA factor, outside the layers' projections, of a product that is zero."""
    match = re.fullmatch(r"(.+\.lora_(?:embedding_)?)([ABab])((?:\.default)?(?:\.weight)?)", name)
    if match is None or not (_other_model(name) or EMBEDDINGS.search(name)):
        return False
    factors = [arrays.get(f"{match[1]}{letter}{match[3]}") for letter in ("AB" if match[2].isupper() else "ab")]
    return all(f is not None for f in factors) and any(f is not None and not f.any().item() for f in factors)


def _is_copy(name: str, value: mx.array, base: Base | None) -> bool:
    """Return whether a weight is an unchanged copy of the base's embedding or head, in the dtype of either."""
    match = EMBEDDINGS.search(name)
    if base is None or match is None or not re.search(r"(?:embed_tokens|lm_head)(?:\.base_layer)?\.weight$", name):
        return False
    has_head = match[1] == "lm_head" and "lm_head" in base.model
    weight = weight_rows(base.model.lm_head if has_head else base.model.model.embed_tokens)
    return value.shape == weight.shape and any(
        mx.array_equal(weight.astype(dtype), value.astype(dtype)).item() for dtype in (weight.dtype, value.dtype)
    )


def _describe_weight(name: str) -> str:
    if other := _other_model(name):
        return f"adapts {other}"
    parts = {"lora_magnitude": "is DoRA's", ".m": "is DoRA's", "lora_embedding": "adapts the embedding", "embed_tokens":
             "belongs to the embedding", "lm_head": "belongs to the head", "bias": "is a bias"}  # fmt: skip
    for mark, part in parts.items():
        if mark in name if mark != ".m" else name.endswith(mark):
            return part
    return "is no LoRA factor of a projection in a layer"


def positive_number(options: dict[str, Any], name: str, config_path: Path) -> float:
    """Return an option that must be a number above 0. Raises UserError for anything else."""
    value = options.get(name)
    if not is_number(value) or value <= 0:
        raise UserError(f"{config_path}: {name} is {value!r:.80}, not a number above 0")
    return value


def _pattern(config: dict[str, Any], name: str, config_path: Path) -> dict[str, Any]:
    """Return PEFT's rank_pattern or alpha_pattern: numbers by module name. Raises UserError if it is not an object."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{config_path}: {name} is {patterns!r:.80}, not an object of modules and numbers")
    return patterns


def _module_value(patterns: dict[str, Any], path: str, default: float, config_path: Path) -> float:
    """Return a module's rank or alpha from a pattern that equals its name or the end of it, else the default.

    Args:
        patterns: numbers by module name.
        path: the module's name in the adapter's own model: the names in `patterns` are of that model too.
        default: for a module without a pattern.
        config_path: the config, for messages.

    PEFT accepts any regular expression here. A regular expression from an untrusted file is refused with UserError, not
    run.
    """
    for pattern in patterns:
        name = pattern.removeprefix("^").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", name):
            raise UserError(f"{config_path}: '{pattern}' is a regular expression; write out the modules' names")
        if path == name or (name == pattern.replace("\\.", ".") and path.endswith(f".{name}")):
            return positive_number(patterns, pattern, config_path)
    return default
