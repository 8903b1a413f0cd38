"""Inputs of a soak test: a base with random weights that takes milliseconds per step, and any number of small skills."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import mlx.core as mx
import yaml
from mlx.utils import tree_flatten
from mlx_lm.models.gemma3_text import Model, ModelArgs

from dylora_mlx import assets

CONFIG = {
    "model_type": "gemma3_text", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2,
    "head_dim": 16, "vocab_size": 4096, "num_key_value_heads": 1, "query_pre_attn_scalar": 16, "sliding_window": 16,
    "sliding_window_pattern": 2, "tie_word_embeddings": True, "max_position_embeddings": 2048,
}  # fmt: skip
PACKAGED = ("flask", "python", "requests", "requests_more", "sql", "stripe")
SIZES = {"train": 36, "validation": 4, "test": 2}
"""Number of documents of each split."""
LONG = 100
"""Characters per document."""


def base(folder: Path) -> Path:
    """Write a Gemma 3 of two layers with random weights, and the embedded base's tokenizer. Returns its folder."""
    folder.mkdir()
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(CONFIG))
    weights = {name: value for name, value in dict(tree_flatten(model.parameters())).items() if "lm_head" not in name}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(assets.BASE / name, folder / name)
    return folder


def skill(folder: Path, number: int) -> Path:
    """Write skill `number`, whose documents are pieces of packaged ones, as a folder of splits. Returns the folder."""
    skill_folder = folder / f"skill_{number}"
    skill_folder.mkdir()
    piece_index, name = number // len(PACKAGED), PACKAGED[number % len(PACKAGED)]
    for split, count in SIZES.items():
        lines = (assets.SKILLS / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        pieces = [text[LONG * piece_index : LONG * (piece_index + 1)] for text in texts]
        chosen = [piece for piece in pieces if piece.strip()] or [text[:LONG] for text in texts]
        records = [json.dumps({"text": chosen[i % len(chosen)]}) for i in range(count)]
        (skill_folder / f"{split}.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")
    return skill_folder


def config(folder: Path, skills: int, steps: int) -> Path:
    """Write the config of a run that creates an expert for each skill and trains it for `steps` steps. Returns its path."""
    path = folder / "soak.yaml"
    sources = [{"name": f"skill_{i}", "source": str(skill(folder, i))} for i in range(skills)]
    settings = {
        "skills": sources,
        "model": {"base": str(base(folder / "base")), "dtype": "float32", "rank": 4, "alpha": 4},
        "growth": {
            "base_skill": None, "policy": "threshold", "threshold": 1.0, "split": False, "min_tokens": 100, "bootstrap": 50,
            "max_experts": skills + 1,
        },
        "data": {"max_seq_length": 32},
        "training": {
            "grad_accumulation_steps": 1, "epochs": steps, "max_steps": steps, "steps_per_eval": max(1, steps // 2), "patience": 10**6,
            "save_every": max(1, steps // 2), "memory_tokens": 128, "rehearsal_tokens": 128, "replay_tokens": 64,
            "router_fit_steps": 10,
        },
    }  # fmt: skip
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return path
