"""A whole run of ours against mlx-lm's trainer with one LoRA on the same documents, evaluations included.

Ours reads each skill with the base, decides, learns an expert for it, evaluates every domain after it and the test documents at
the end, and writes checkpoints and the report. mlx-lm trains one LoRA for as many epochs over all skills together, evaluates all
validation documents as often, and the test documents at the end. Loading and tokenizing are left out on both sides.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import mlx.core as mx
import mlx.optimizers as optim
from mlx_lm.tuner.trainer import TrainingArgs, evaluate, train
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
from rich.table import Table

from benchmarking.ratios import paired
from dylora_mlx.adapters import mlx_lm
from dylora_mlx.config import Config, DataConfig, GrowthConfig, ModelConfig, Source, TrainingConfig
from dylora_mlx.data.stream import Split
from dylora_mlx.model.kernels import numerics
from dylora_mlx.run import loop, run_folder
from dylora_mlx.training.run import TrainingRun

SKILLS = ("requests", "stripe", "flask", "sql")
"""The packaged skills of the stream; the base's own text is `python`."""
BATCH_SIZE = 4
"""Rows of a step of ours, and documents of a step of mlx-lm's (its default)."""


def stream(base: str, length: int, limit: int | None) -> Config:
    """Return the config of the stream: one epoch of every skill, of at most `limit` training documents each."""
    return Config(
        [Source(name=name, source=f"packaged/{name}", limit=limit) for name in SKILLS],
        data=DataConfig(max_seq_length=length),
        model=ModelConfig(base=base),
        training=TrainingConfig(epochs=1, batch_size=BATCH_SIZE // 2, grad_accumulation_steps=2, learning_rate=1e-3),
        growth=GrowthConfig(min_tokens=1000),
    )


def measure(base: str, length: int, limit: int | None, runs: int) -> dict[str, Any]:
    """Measure both in turns. Returns seconds and processor seconds of each, ours by activity too, and ratios ours / mlx-lm."""
    config, ours, theirs, steps, experts = stream(base, length, limit), [], [], 0, 0
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            run = run_folder.start_run(config, Path(folder) / "run")
            ours.append(timed(lambda run=run: loop.learn_stream(run)) | {"parts": run.timers.totals()["seconds"]})
            theirs.append(mlx_lm_run(run, Path(folder)))
            steps, experts = run.state.step, len(run.pool)
    ratios = {
        kind: paired([each[kind] for each in ours], [each[kind] for each in theirs])
        for kind in ("seconds", "processor")
    }
    return {"ours": ours, "mlx-lm": theirs, "steps": steps, "experts": experts, "ratios": ratios}


def timed(work: Callable[[], object]) -> dict[str, Any]:
    """Do some work and return its seconds, and its processor seconds, which other programs on the machine do not lengthen."""
    started, processor = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - started, "processor": time.process_time() - processor}


def mlx_lm_run(run: TrainingRun, folder: Path) -> dict[str, Any]:
    """Train one LoRA of the experts' rank on the documents that a run of ours learned, with mlx-lm's trainer."""
    skills = [*([run.base_skill] if run.base_skill else []), *run.skills]
    training, validation, test = (
        documents([getattr(skill, split) for skill in of_skills])
        for split, of_skills in (("train", run.skills), ("validation", skills), ("test", skills))
    )
    model, _ = load_model(run.base.folder)
    if numerics.on_cpu():
        model.set_dtype(mx.float32)
        # mlx-lm compiles its step. On a CPU that gains nothing and needs a C++ compiler.
        mx.disable_compile()
    model.freeze()
    options = run.config.model
    lora = {"rank": options.rank, "scale": options.alpha / options.rank, "dropout": 0.0}
    keys = [mlx_lm.module_key(name) for name in options.projection_names]
    linear_to_lora_layers(model, run.base.args.num_hidden_layers, lora | {"keys": keys})
    iterations, length = len(training) // BATCH_SIZE * run.config.training.epochs, run.config.data.max_seq_length + 1
    # With the first step, as often as ours evaluates: the base, and after every skill.
    every = -(-iterations // len(run.skills))
    args = TrainingArgs(
        BATCH_SIZE, iterations, -1, max(1, iterations // 10), every, iterations + 1, length,
        str(folder / "adapters.safetensors"),
    )  # fmt: skip

    def train_and_test() -> None:
        train(model, optim.AdamW(run.config.training.learning_rate), training, validation, args)
        evaluate(model, test, BATCH_SIZE, -1, length)

    try:
        return timed(train_and_test)
    finally:
        mx.enable_compile()


def documents(splits: Sequence[Split]) -> list[tuple[list[int], int]]:
    """Return (tokens, prompt length 0) of every segment, as mlx-lm's trainer takes documents."""
    return [(segment.tokens.tolist(), 0) for split in splits for segment in split.segments]


def table(results: dict[str, Any]) -> Table:
    """Return the results as a table: median seconds of each, and the parts of ours."""
    parts = sorted(results["ours"][0]["parts"], key=lambda name: -results["ours"][0]["parts"][name])
    ratios = ", ".join(
        f"{each['ratio']:.2f} ({each['low']:.2f} to {each['high']:.2f}) in {name}"
        for name, each in zip(("time", "processor time"), results["ratios"].values(), strict=True)
    )
    shown = Table(
        title=f"whole run: {results['experts']} experts in {results['steps']} steps", caption=f"ours / mlx-lm: {ratios}"
    )
    for heading in ("", "s", "processor s", *parts):
        shown.add_column(heading, justify="left" if heading == "" else "right")
    for name in ("ours", "mlx-lm"):
        middle = sorted(results[name], key=lambda each: each["seconds"])[len(results[name]) // 2]
        spent = (
            middle["seconds"],
            middle["processor"],
            *(middle["parts"][part] for part in parts if "parts" in middle),
        )
        shown.add_row(name, *(f"{seconds:.1f}" for seconds in spent))
    return shown
