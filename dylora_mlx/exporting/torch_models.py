"""PyTorch's side: its libraries are imported when something is asked of them, and MLX never."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from dylora_mlx.errors import UserError

RUNTIME = Path(__file__).parent / "dylora_torch.py"
"""The file that goes into every exported mixture."""


def import_torch() -> Any:
    """torch, once transformers and peft are there too. Raises UserError where one is not."""
    # What these libraries deprecate in each other is nobody's concern here.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        import peft  # noqa: F401
        import torch
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise UserError(
            f"--verify needs torch, transformers and peft ({error}): pip install 'dylora-mlx[export]'"
        ) from error
    disable_progress_bar()
    return torch


def load_torch_base(torch: Any, folder: Path, dims: int) -> Any:
    """transformers' model of a base with hidden size `dims`, in float32. Raises UserError for one that it cannot load."""
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except Exception as error:  # a quantised MLX checkpoint: transformers has many words for it
        raise UserError(f"{folder}: transformers cannot load this base, so nothing can be compared with it") from error
    # mlx-lm rounds the embedding's scale through bfloat16, as Gemma was trained; transformers in float32 does not.
    if model.config.model_type == "gemma3_text":
        model.get_input_embeddings().embed_scale.fill_(torch.tensor(dims**0.5, dtype=torch.bfloat16).float())
    return model.eval()


def load_runtime(out: Path) -> Any:
    """The runtime as it lies in a folder. Raises UserError where it does not."""
    path = out / RUNTIME.name
    if not path.is_file():
        raise UserError(f"{path}: missing; give a folder that dylora export --format xlora or runtime wrote")
    spec = importlib.util.spec_from_file_location("dylora_torch_exported", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def token_tensor(torch: Any, tokens: np.ndarray) -> Any:
    """Token ids [L] as a tensor [1, L]."""
    return torch.from_numpy(tokens[None].astype(np.int64))
