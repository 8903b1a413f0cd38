"""Defaults that depend on the base: options that were measured to need other values on a base of another size.

A preset lies below config files and the command line: whatever these set stays as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from dylora_mlx.config.training import ModelConfig

PresetName = Literal["tiny", "small", "large"]


class Preset(NamedTuple):
    """Defaults for bases of one size."""

    largest: float
    """Number of parameters up to which a base has this size."""
    options: dict[str, Any]
    """Values by the option's full name."""


PRESETS: dict[PresetName, Preset] = {
    "tiny": Preset(50e6, {}),
    "small": Preset(1e9, {"training.learning_rate": 5e-4}),
    "large": Preset(float("inf"), {"training.learning_rate": 2e-4}),
}
"""Presets by size, in ascending order. tiny holds the options' plain defaults, measured on the embedded base; small was
measured on Gemma 3 270M (docs/gemma3-270m.md); large was not measured here: it is the rate of Dettmers et al. 2023,
"QLoRA", appendix B, for LoRA on all linear layers of 7 and 13 billion parameters."""
GGUF_BYTES = 0.6
"""Bytes per parameter of a GGUF file, of which only the size is read here: about that of 4-bit weights."""
_SIZE_IN_NAME = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([mb])(?![a-z0-9])")
_UNKNOWN = 270e6


def preset_for(base: str, preset: str = "auto") -> PresetName:
    """Return the preset of a base: the given one, or for auto that of its size.

    The size is that of a local folder's config.json or a GGUF file; for a hub id it is read from the name, as in
    google/gemma-3-270m. A base of unknown size counts as small.
    """
    if preset in get_args(PresetName):
        return preset  # type: ignore[return-value]
    parameters = _parameters(base)
    return next(name for name, each in PRESETS.items() if parameters <= each.largest)


def preset_tree(trees: Iterable[Mapping[str, Any]], overrides: Mapping[str, str]) -> dict[str, Any]:
    """Return the preset's options as nested values, for config files (later ones win) and options by full name.

    Empty if the base or the preset is not a text; the check of the options says so.
    """
    default = ModelConfig()
    chosen = {"base": default.base, "preset": default.preset}
    for tree in trees:
        section = tree.get("model")
        chosen |= {key: section[key] for key in chosen if key in section} if isinstance(section, dict) else {}
    chosen |= {key: overrides[f"model.{key}"] for key in chosen if f"model.{key}" in overrides}
    if not all(isinstance(value, str) for value in chosen.values()):
        return {}
    nested: dict[str, Any] = {}
    for name, value in PRESETS[preset_for(**chosen)].options.items():
        section, _, option = name.rpartition(".")
        nested.setdefault(section, {})[option] = value
    return nested


def _parameters(base: str) -> float:
    """Return the approximate number of parameters of a base."""
    if base == "embedded":
        return 0.0
    path = Path(base).expanduser()
    if base.endswith(".gguf") and path.is_file():
        return path.stat().st_size / GGUF_BYTES
    try:
        args = json.loads((path / "config.json").read_text(encoding="utf-8"))
        args = args.get("text_config", args)
        hidden, layers, vocabulary = (int(args[key]) for key in ("hidden_size", "num_hidden_layers", "vocab_size"))
        # Attention has up to four square matrices a layer, the MLP three of hidden_size * intermediate_size.
        return hidden * (vocabulary + layers * (4 * hidden + 3 * int(args["intermediate_size"])))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        match = _SIZE_IN_NAME.search(base.rpartition("/")[2].lower())
        return float(match[1]) * {"m": 1e6, "b": 1e9}[match[2]] if match else _UNKNOWN
