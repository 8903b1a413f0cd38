"""Write an expert as a GGUF LoRA file with the `gguf` package, and read it again to verify it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dylora_mlx.adapters import gguf_lora
from dylora_mlx.errors import UserError
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.gguf.config import ARCHITECTURE_OF
from dylora_mlx.model.gguf.reader import GGUFFile
from dylora_mlx.model.gguf.tensors import read_tensor, require_package
from dylora_mlx.model.gguf.weights import CODES, DType

FILE_TYPES: dict[DType, str] = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
"""Values of general.file_type by dtype, as the `gguf` package names them."""


def write_adapter(
    path: Path, expert: Expert, config: Mapping[str, Any], metadata: Mapping[str, str | float], dtype: DType
) -> None:
    """Write an expert as a GGUF LoRA adapter.

    Args:
        path: the file.
        expert: the expert.
        config: the base's config, or mlx-lm's model arguments by name.
        metadata: as `gguf_lora.metadata` returns it.
        dtype: dtype of the factors.

    Raises UserError for factors beyond float16, OSError for a disk that is full.
    """
    gguf = require_package()
    kind = gguf.GGMLQuantizationType[CODES[dtype]]
    writer = gguf.GGUFWriter(path, ARCHITECTURE_OF[config["model_type"]])
    for key, value in metadata.items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_float32(key, value)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, values in gguf_lora.tensors(expert, config).items():
        if dtype == "float16" and np.abs(values).max() > np.finfo(np.float16).max:
            raise UserError(f"{name} has values beyond float16; choose --dtype bfloat16 or float32")
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_updates(path: Path, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the weight updates of a file that `write_adapter` wrote, by weight: [outputs, inputs], float32."""
    file = GGUFFile(path)
    arrays = {name: read_tensor(file, name) for name in file.tensors}
    return gguf_lora.updates(arrays, file.metadata["adapter.lora.alpha"], config)
