"""PyTorch models to verify exports against. torch, transformers and peft are imported on first use, MLX never."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from dylora_mlx.errors import UserError

RUNTIME = Path(__file__).parent / "dylora_torch.py"
"""The PyTorch runtime, a single file that every exported mixture contains."""


def import_torch() -> Any:
    """Import and return torch. Raises UserError if torch, transformers or peft is not installed."""
    # These libraries trigger each other's FutureWarnings; users cannot act on them.
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


def load_torch_base(torch: Any, folder: Path, hidden_size: int) -> Any:
    """Load a base with transformers in float32, in eval mode. Raises UserError if transformers cannot load it."""
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except Exception as error:  # a quantised MLX checkpoint, for which transformers raises many exception types
        raise UserError(f"{folder}: transformers cannot load this base, so nothing can be compared with it") from error
    # Gemma was trained with the embedding scale rounded to bfloat16. mlx-lm rounds it; transformers in float32 doesn't.
    if model.config.model_type == "gemma3_text":
        model.get_input_embeddings().embed_scale.fill_(torch.tensor(hidden_size**0.5, dtype=torch.bfloat16).float())
    return model.eval()


def load_runtime(folder: Path) -> Any:
    """Import the PyTorch runtime from an exported folder. Raises UserError if the folder does not contain it."""
    path = folder / RUNTIME.name
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
    """Return token ids [L] as an int64 tensor [1, L]."""
    return torch.from_numpy(tokens[None].astype(np.int64))
