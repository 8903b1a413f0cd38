"""Evaluate an exported mixture in PyTorch, on CUDA if present: loss and speed of the base, each expert and the mixture.

    python tools/benchmarks/evaluate_cuda.py quickstart-torch
    python tools/benchmarks/evaluate_cuda.py mix --base google/gemma-3-270m --data sql=sql.jsonl --json found.json
    python tools/benchmarks/evaluate_cuda.py quickstart-torch --generate 64

FOLDER was written by dylora export --format xlora or --format runtime. Domains are the run's own skills, if their data
can be found again (packaged/NAME, hub data sets), and those of --data. Losses are in nats per token over the test
split, with every token routed to the named expert, or by the mixture's router. --generate continues the beginnings of
some texts greedily: with the runtime's key-value caches, without them, and with PEFT's X-LoRA if the folder is one. It
compares their tokens and their speed. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from torch_evaluation import generation
from torch_evaluation.generation import Generated

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.config import DataConfig, Source
from dylora_mlx.data import formatting, skills
from dylora_mlx.errors import UserError
from dylora_mlx.exporting import torch_models
from dylora_mlx.model.base.tokenizer import RenderingTokenizer
from dylora_mlx.system.files import check_output_file, read_json

console = Console(width=110)


class Measured(NamedTuple):
    """Measurement of one text. Field names are keys of the JSON file."""

    nats: float
    """Mean loss per token with a loss."""
    speed: float
    """Tokens per second, without padding."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python tools/benchmarks/evaluate_cuda.py", __doc__)
    add = parser.add_argument
    add("folder", type=Path, help="an exported mixture")
    add("--base", help="the base, if it has moved since the export")
    add(
        "--data",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="a domain: a .jsonl file, packaged/NAME, a hub id",
    )
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16, float32 on a CPU")
    add("--limit", type=int, default=64, help="maximum documents per domain")
    add("--length", type=int, default=512, help="maximum tokens per document")
    add("--batch", type=int, default=8, help="documents per batch (batch size)")
    add(
        "--generate",
        type=int,
        default=0,
        metavar="N",
        help="also generate N tokens in every available way, and compare",
    )
    add("--json", type=Path, help="write the results to this file")
    options = parser.parse_args(argv)
    for name in ("limit", "length", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.generate < 0:
        parser.error("--generate must be at least 0")
    if options.json:
        check_output_file(options.json)
    return options


def load(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Return torch, and the model and tokenizer as loaded by the runtime in the folder. Raises UserError."""
    try:
        import torch
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise UserError(f"this needs torch and transformers ({error}): pip install 'dylora-mlx[export]'") from error
    warnings.filterwarnings("ignore", category=FutureWarning)
    disable_progress_bar()
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = options.device
    if device == "auto":
        device = next(name for name, is_available in available.items() if is_available)
        if device == "cpu":
            console.print("no CUDA device here: on the CPU, in float32")
    if not available[device]:
        raise UserError(f"--device {device}: there is none here")
    dtype = options.dtype if options.dtype != "auto" else "float32" if device == "cpu" else "bfloat16"
    runtime = torch_models.load_runtime(options.folder)
    try:
        model, tokenizer = runtime.load(options.folder, options.base, device, getattr(torch, dtype))
    except runtime.FolderError as error:
        raise UserError(str(error)) from error
    console.print(
        f"{_describe(torch, device)}, {dtype}; {len(model.names)} experts with the base: {', '.join(model.names)}"
    )
    return torch, model, tokenizer


def _describe(torch: Any, device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def domains(options: argparse.Namespace) -> list[Source]:
    """Return the run's skills and those of --data, which can also give a new location for one of the run's.

    Raises UserError for an invalid manifest or --data.
    """
    manifest = read_json(options.folder / "dylora.json")
    try:
        base_skill = [manifest["base_skill"]] if manifest.get("base_skill") else []
        by_name = {item["name"]: Source(**item) for item in (*base_skill, *manifest.get("sources", []))}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{options.folder / 'dylora.json'}: base_skill or sources are no skills ({error}); export again"
        ) from error
    for value in options.data:
        name, _, source = value.partition("=")
        try:
            by_name[name] = (
                replace(by_name[name], source=source) if name in by_name else Source(name=name, source=source)
            )
        except ValueError as error:
            raise UserError(f"--data {value}: should be NAME=SOURCE, for example sql=sql.jsonl ({error})") from error
    return list(by_name.values())


def documents(source: Source, tokenizer: Any, options: argparse.Namespace) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (token ids [n], loss mask [n]) of test documents, cut to the maximum length. Raises UserError."""
    manifest = read_json(options.folder / "dylora.json")
    splits = dict(manifest.get("splits", {}))
    seed = splits.pop("seed", 0)
    records = skills.read_source(source, DataConfig(**splits), seed)
    chosen: Any = islice(records.test, options.limit)
    eos_token_ids = (manifest.get("prompt") or {}).get("eos_token_ids", ())
    is_wrapped = isinstance(tokenizer, RenderingTokenizer)
    wrapped = tokenizer if is_wrapped else RenderingTokenizer(tokenizer, eos_token_ids=eos_token_ids)
    documents = formatting.collect(formatting.encode_records(chosen, records.source, wrapped)).documents
    return [(d.tokens[: options.length], d.loss_mask[: options.length]) for d in documents]


def evaluate(torch: Any, model: Any, texts: Sequence[tuple[np.ndarray, np.ndarray]], batch: int) -> Measured:
    """Measure mean loss and speed under the current routing of the model."""
    nats, num_loss_tokens, num_tokens, seconds = 0.0, 0, 0, 0.0
    ordered = sorted(texts, key=lambda text: len(text[0]))
    for start in range(0, len(ordered), batch):
        rows = ordered[start : start + batch]
        length = max(len(row) for row, _ in rows)
        ids, mask, loss_mask = (np.zeros((len(rows), length), np.int64) for _ in range(3))
        for i, (row, weights) in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)], loss_mask[i, : len(row)] = row, 1, weights
        tensors = [torch.from_numpy(array).to(model.device) for array in (ids, mask, loss_mask)]
        started = _now(torch, model)
        with torch.no_grad():
            logits = model(tensors[0], attention_mask=tensors[1], use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tensors[0][:, 1:], reduction="none")
            weights = tensors[2][:, 1:] * tensors[1][:, 1:]
            nats += float((loss * weights).sum())
        seconds += _now(torch, model) - started
        num_loss_tokens, num_tokens = num_loss_tokens + int(weights.sum()), num_tokens + int(mask.sum())
    return Measured(nats / max(num_loss_tokens, 1), num_tokens / max(seconds, 1e-9))


def _now(torch: Any, model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def command(argv: list[str]) -> int:
    options = parse(argv)
    torch, model, tokenizer = load(options)
    results: dict[str, dict[str, Measured]] = {}
    prompts: list[np.ndarray] = []
    for source in domains(options):
        try:
            texts = documents(source, tokenizer, options)
        except UserError as error:
            console.print(f"{source.name} is left out: {error}; say where it is with --data {source.name}=FILE")
            continue
        if not results:  # warm-up: exclude first-time compilation and allocation
            evaluate(torch, model, texts[: options.batch], options.batch)
        row = {"mixture": evaluate(torch, model, texts, options.batch)}
        for name in model.names:
            with model.routed_to(name):
                row[name] = evaluate(torch, model, texts, options.batch)
        results[source.name] = row
        prompts += [tokens for tokens, _ in texts[:1]]
    if not results:
        raise UserError("no domain's text could be read; give some with --data NAME=SOURCE")
    _show(results, ["mixture", *model.names])
    generated = {}
    if options.generate:
        generated = generation.compare(torch, model, options.folder, prompts, options.generate)
        _show_generated(generated, options.generate)
    if options.json:
        values: dict[str, Any] = {
            "texts": {
                name: {model_name: measured._asdict() for model_name, measured in row.items()}
                for name, row in results.items()
            },
            "generated": {way: way_result._asdict() for way, way_result in generated.items()},
        }
        options.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return 0


def _show(results: dict[str, dict[str, Measured]], names: Sequence[str]) -> None:
    table = Table("text", *names, title="loss, nats per token", title_justify="left")
    for name, row in results.items():
        best = min(names, key=lambda candidate: row[candidate].nats)
        table.add_row(
            name,
            *(
                f"[bold]{row[model_name].nats:.3f}[/bold]" if model_name == best else f"{row[model_name].nats:.3f}"
                for model_name in names
            ),
        )
    console.print(table)
    speeds = (
        f"{model_name} {np.median([row[model_name].speed for row in results.values()]):,.0f}"
        for model_name in ("base", "mixture")
    )
    console.print(f"tokens per second, median over texts: {', '.join(speeds)}")


def _show_generated(results: dict[str, Generated], count: int) -> None:
    table = Table(
        "by",
        "same tokens",
        "tokens per second",
        "times as long",
        title=f"{count} tokens, greedily",
        title_justify="left",
    )
    for way, result in results.items():
        table.add_row(way, f"{result.same} of {result.prompts}", f"{result.speed:,.1f}", f"{result.longer:.2f}")
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
