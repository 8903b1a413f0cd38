"""Inputs of a growing run: a base of two layers, and any number of small skills that are told apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml
from soaking import inputs

SIZES = {"train": 52, "validation": 6, "test": 6}
"""Number of documents of each split: 64 in all."""
WORDS, LETTERS, LENGTH = 20, 4, 10
"""Words and letters of a skill, and words of a document."""


def skill(folder: Path, number: int) -> Path:
    """Write skill `number`: documents of words that this skill alone has. Returns its folder."""
    rng, target = np.random.default_rng(number), folder / f"skill_{number}"
    letters = rng.choice(list("abcdefghijklmnopqrstuvwxyz0123456789_.:"), LETTERS, replace=False)
    words = ["".join(rng.choice(letters, rng.integers(2, 7))) for _ in range(WORDS)]
    target.mkdir(parents=True)
    for split, count in SIZES.items():
        texts = [" ".join(rng.choice(words, LENGTH)) for _ in range(count)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (target / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return target


def config(folder: Path, skills: int, **changes: dict) -> Path:
    """Write the config of a run over `skills` skills, the base and the data. Returns the config's path.

    `changes` are options by section, in addition to those of the test.
    """
    settings: dict[str, dict] = {
        "model": {"base": str(inputs.base(folder / "base")), "dtype": "float32", "rank": 4, "alpha": 4, "gather_threshold": 4.0},
        "growth": {
            "base_skill": None, "policy": "threshold", "threshold": 1.0, "split": False, "min_tokens": 100, "min_samples": 8,
            "max_experts": skills + 1, "dense_steps": 2, "anneal_steps": 2,
        },
        "data": {"max_seq_length": 64},
        "eval": {"total_tokens": 4096},
        "training": {"learning_rate": 3e-3, "grad_accumulation_steps": 1, "max_steps": 8, "steps_per_eval": 8, "memory_tokens": 256},
    }  # fmt: skip
    for section, options in changes.items():
        settings[section] |= options
    sources = [{"name": f"skill_{i}", "source": str(skill(folder / "data", i))} for i in range(1, skills + 1)]
    path = folder / "grow.yaml"
    path.write_text(yaml.safe_dump({"skills": sources, **settings}, sort_keys=False), encoding="utf-8")
    return path
