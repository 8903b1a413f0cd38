"""Convert a GGUF file's scaling of rotary position embeddings (RoPE) to rope_scaling of config.json."""

from __future__ import annotations

from typing import Any

import numpy as np

from dylora_mlx.errors import UserError
from dylora_mlx.model.gguf.reader import GGUFFile
from dylora_mlx.model.gguf.tensors import read_tensor

FACTORS = "rope_freqs.weight"
"""Tensor of float32 factors [head_dim / 2] that divide the rotary frequencies: the result of Llama 3's scaling."""
LLAMA3_BANDS = (1.0, 4.0)
"""low_freq_factor and high_freq_factor of every published Llama 3."""
YARN_NAMES = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
"""Options of YaRN (Peng et al. 2023) that have a name in config.json, by their names below rope.scaling."""
YARN_FIXED = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0}
"""Values of options of YaRN that mlx-lm's model of these architectures cannot change."""


def scaling(file: GGUFFile) -> dict[str, Any] | None:
    """Return rope_scaling of config.json, None for no scaling.

    Raises UserError for a scaling that mlx-lm does not read, or that the file describes incompletely.
    """
    if FACTORS in file.tensors:
        return _llama3(file)
    kind = file.metadata.get(file.architecture_key("rope.scaling.type"), "none")
    factor = file.number("rope.scaling.factor", file.number("rope.scale_linear", 1.0))
    if kind == "none" and factor != 1.0:
        kind = "linear"  # files from before rope.scaling.type existed
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(file, factor)
    raise UserError(f"{file.path}: rotary scaling {kind!r:.40} cannot be read, only linear, yarn and Llama 3's can")


def _yarn(file: GGUFFile, factor: float) -> dict[str, Any]:
    for name, value in YARN_FIXED.items():
        stated = file.number(f"rope.scaling.{name}", value)
        if not np.isclose(stated, value):
            raise UserError(
                f"{file.path}: {file.architecture_key(f'rope.scaling.{name}')} is {stated:g}, but mlx-lm's YaRN has {value:g}"
            )
    options = {
        new: file.number(f"rope.scaling.{old}")
        for old, new in YARN_NAMES.items()
        if file.architecture_key(f"rope.scaling.{old}") in file.metadata
    }
    original = file.integer("rope.scaling.original_context_length")
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **options}


def _llama3(file: GGUFFile) -> dict[str, Any]:
    """Find the options of Llama 3's scaling that give the factors in the file.

    The factors determine low_freq_factor, high_freq_factor and the original length up to a common scale; with the
    published LLAMA3_BANDS only powers of two remain to be tried for the length.

    Raises UserError if no options give these factors.
    """
    factors = read_tensor(file, FACTORS).reshape(-1)
    base = file.number("rope.freq_base", 10_000.0)
    dims = 2 * len(factors)
    wavelengths = 2 * np.pi * base ** (np.arange(0, dims, 2) / dims)
    for length in (2**power for power in range(6, 24)):
        options = {
            "rope_type": "llama3",
            "factor": float(np.round(factors.max(), 4)),
            "low_freq_factor": LLAMA3_BANDS[0],
            "high_freq_factor": LLAMA3_BANDS[1],
            "original_max_position_embeddings": length,
        }
        if np.allclose(llama3_factors(wavelengths, **options), factors, rtol=1e-4):
            return options
    raise UserError(f"{file.path}: the rotary factors in {FACTORS} are not those of Llama 3's scaling")


def llama3_factors(
    wavelengths: np.ndarray,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
    **_: object,
) -> np.ndarray:
    """Return the divisor of each rotary frequency under Llama 3's scaling, from the wavelengths in tokens.

    The divisor is 1 for short wavelengths, `factor` for long ones, and interpolated between the two bands.
    """
    smooth = (original_max_position_embeddings / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)
    return 1 / ((1 - np.clip(smooth, 0, 1)) / factor + np.clip(smooth, 0, 1))
