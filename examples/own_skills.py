"""Learn two skills from your own files, on the embedded base, in about a minute.

    python examples/own_skills.py

It writes two JSONL files as you would bring them, learns an expert for each, and prints what each one gained. Replace the
files by your own; with `base="google/gemma-3-270m"` the same lines train Gemma 3.
"""

from __future__ import annotations

import inspect
import json
import pkgutil
import random
from importlib import import_module
from pathlib import Path

import dylora_mlx
from dylora_mlx import Config, Source
from dylora_mlx.config import GrowthConfig, ModelConfig, TrainingConfig

MODULES = ("argparse", "calendar", "csv", "datetime", "decimal", "email.message", "fractions", "json", "logging", "pathlib",
           "shutil", "statistics", "string", "subprocess", "textwrap", "typing", "urllib.parse", "zipfile")  # fmt: skip


def docstrings() -> list[dict[str, str]]:
    """Prompt and completion: the signature of a function of the standard library, and its docstring."""
    records = []
    for name in MODULES:
        module = import_module(name)
        for function_name, function in inspect.getmembers(module, inspect.isfunction):
            text = inspect.getdoc(function)
            if text and function.__module__ == module.__name__:
                prompt = f"def {function_name}{inspect.signature(function)}:\n"
                records.append({"prompt": prompt, "completion": f'    """{text}"""'})
    return records


def log_lines() -> list[dict[str, str]]:
    """Plain text: excerpts of a server's log."""
    draw = random.Random(0)
    names = [module.name for module in pkgutil.iter_modules()][:40]
    records = []
    for _ in range(64):
        lines = []
        for _ in range(6):
            status, path = draw.choice([200, 200, 200, 304, 404, 500]), draw.choice(names)
            second, taken = draw.randrange(60), draw.randrange(3, 900)
            lines.append(
                f'10.0.0.{draw.randrange(9)} - [12/Mar/2026:09:14:{second:02}] "GET /{path}" {status} {taken}ms'
            )
        records.append({"text": "\n".join(lines)})
    return records


def write_jsonl(path: Path, records: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def main() -> None:
    data = Path("data")
    data.mkdir(exist_ok=True)
    write_jsonl(data / "docstrings.jsonl", docstrings())
    write_jsonl(data / "logs.jsonl", log_lines())

    config = Config(
        skills=[
            Source(name="docstrings", source="data/docstrings.jsonl", limit=64),  # only the completion is learned
            Source(name="logs", source="data/logs.jsonl"),
        ],
        model=ModelConfig(base="embedded", rank=8),
        # What the base knows already: its loss must not get worse. Few documents of it keep this example short.
        growth=GrowthConfig(base_skill=Source(name="python", source="packaged/python", limit=40)),
        training=TrainingConfig(max_steps=8, steps_per_eval=8),
    )
    run = dylora_mlx.learn(config, name="own-skills")  # the run folder is runs/own-skills

    print("\ntest loss, nats per token")
    for name, loss in run.results["test"].items():
        print(f"{name:12} base {loss['base']:.3f}, with the experts {loss['mixture']:.3f}")


if __name__ == "__main__":
    main()
