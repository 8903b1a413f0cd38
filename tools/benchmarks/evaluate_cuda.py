"""Evaluate an exported mixture in PyTorch, on CUDA where there is one: loss and speed of the base, each expert and the mixture.

    python tools/benchmarks/evaluate_cuda.py quickstart-torch
    python tools/benchmarks/evaluate_cuda.py mix --base google/gemma-3-270m --data sql=sql.jsonl --json found.json
    python tools/benchmarks/evaluate_cuda.py quickstart-torch --generate 64

FOLDER is what dylora export --format xlora or --format runtime wrote. Domains are the run's own skills where their data can be
found again (packaged/NAME, hub data sets), and those of --data. Losses are in nats a token over the test split, with every
token of a text on the named expert, or routed. --generate continues the beginnings of some texts greedily with the runtime's
key-value caches, without them, and with PEFT's X-LoRA where the folder is one: are the tokens the same, and how fast is each?
Needs torch and transformers.
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
from dylora_mlx.system.files import check_output_file, read_json

console = Console(width=110)


class Measured(NamedTuple):
    """nats: mean loss a learned token; speed: tokens a second, all of them counted, padding not."""

    nats: float
    speed: float


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python tools/benchmarks/evaluate_cuda.py", __doc__)
    add = parser.add_argument
    add("folder", type=Path, help="an exported mixture")
    add("--base", help="the base, if it is not where it was at the export")
    add(
        "--data",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="a domain: a .jsonl file, packaged/NAME, a hub id",
    )
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16, on a CPU float32")
    add("--limit", type=int, default=64, help="documents of each domain")
    add("--length", type=int, default=512, help="tokens of a document at most")
    add("--batch", type=int, default=8, help="documents at a time")
    add(
        "--generate", type=int, default=0, metavar="N", help="also generate N tokens in every way there is, and compare"
    )
    add("--json", type=Path, help="write the figures to a file")
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
    """torch, the model and its tokenizer, by the folder's own runtime."""
    try:
        import torch
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise UserError(f"this needs torch and transformers ({error}): pip install 'dylora-mlx[export]'") from error
    warnings.filterwarnings("ignore", category=FutureWarning)
    disable_progress_bar()
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = options.device
    if device == "auto":
        device = next(name for name, found in there.items() if found)
        if device == "cpu":
            console.print("no CUDA device here: on the CPU, in float32")
    if not there[device]:
        raise UserError(f"--device {device}: there is none here")
    dtype = options.dtype if options.dtype != "auto" else "float32" if device == "cpu" else "bfloat16"
    runtime = torch_models.load_runtime(options.folder)
    try:
        model, tokenizer = runtime.load(options.folder, options.base, device, getattr(torch, dtype))
    except runtime.FolderError as error:
        raise UserError(str(error)) from error
    console.print(f"{_describe(torch, device)}, {dtype}; {len(model.names)} columns: {', '.join(model.names)}")
    return torch, model, tokenizer


def _describe(torch: Any, device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def domains(options: argparse.Namespace) -> list[Source]:
    """The run's own skills, and what --data names; one of them may be named again to say where it is now."""
    manifest = read_json(options.folder / "dylora.json")
    try:
        base_skill = [manifest["base_skill"]] if manifest.get("base_skill") else []
        found = {item["name"]: Source(**item) for item in (*base_skill, *manifest.get("sources", []))}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{options.folder / 'dylora.json'}: base_skill or sources are no skills ({error}); export again"
        ) from error
    for value in options.data:
        name, _, source = value.partition("=")
        try:
            found[name] = replace(found[name], source=source) if name in found else Source(name=name, source=source)
        except ValueError as error:
            raise UserError(f"--data {value}: should be NAME=SOURCE such as sql=sql.jsonl ({error})") from error
    return list(found.values())


def documents(source: Source, tokenizer: Any, options: argparse.Namespace) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids [n] and 1 where a token is learned [n], of test documents, cut to a length."""
    splits = dict(read_json(options.folder / "dylora.json").get("splits", {}))
    seed = splits.pop("seed", 0)
    records = skills.read_source(source, DataConfig(**splits), seed)
    chosen: Any = islice(records.test, options.limit)
    encoded = formatting.encode_all(chosen, records.source, tokenizer, "test")
    return [(d.tokens[: options.length], d.loss_mask[: options.length]) for d in encoded]


def evaluate(torch: Any, model: Any, texts: Sequence[tuple[np.ndarray, np.ndarray]], batch: int) -> Measured:
    """Mean loss and speed under the model's routing as it is."""
    nats, learned, tokens, seconds = 0.0, 0, 0, 0.0
    ordered = sorted(texts, key=lambda text: len(text[0]))
    for begin in range(0, len(ordered), batch):
        rows = ordered[begin : begin + batch]
        length = max(len(row) for row, _ in rows)
        ids, mask, learn = (np.zeros((len(rows), length), np.int64) for _ in range(3))
        for i, (row, wanted) in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)], learn[i, : len(row)] = row, 1, wanted
        given = [torch.from_numpy(array).to(model.device) for array in (ids, mask, learn)]
        started = _now(torch, model)
        with torch.no_grad():
            logits = model(given[0], attention_mask=given[1], use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), given[0][:, 1:], reduction="none")
            wanted = given[2][:, 1:] * given[1][:, 1:]
            nats += float((loss * wanted).sum())
        seconds += _now(torch, model) - started
        learned, tokens = learned + int(wanted.sum()), tokens + int(mask.sum())
    return Measured(nats / max(learned, 1), tokens / max(seconds, 1e-9))


def _now(torch: Any, model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def command(argv: list[str]) -> int:
    options = parse(argv)
    torch, model, tokenizer = load(options)
    found: dict[str, dict[str, Measured]] = {}
    prompts: list[np.ndarray] = []
    for source in domains(options):
        try:
            texts = documents(source, tokenizer, options)
        except UserError as error:
            console.print(f"{source.name} is left out: {error}; say where it is with --data {source.name}=FILE")
            continue
        if not found:  # what is compiled or allocated the first time is not what is measured
            evaluate(torch, model, texts[: options.batch], options.batch)
        row = {"mixture": evaluate(torch, model, texts, options.batch)}
        for name in model.names:
            with model.routed_to(name):
                row[name] = evaluate(torch, model, texts, options.batch)
        found[source.name] = row
        prompts += [tokens for tokens, _ in texts[:1]]
    if not found:
        raise UserError("no domain's text could be read; give some with --data NAME=SOURCE")
    _show(found, ["mixture", *model.names])
    generated = {}
    if options.generate:
        generated = generation.compare(torch, model, options.folder, prompts, options.generate)
        _show_generated(generated, options.generate)
    if options.json:
        plain: dict[str, Any] = {
            "texts": {name: {column: m._asdict() for column, m in row.items()} for name, row in found.items()},
            "generated": {way: g._asdict() for way, g in generated.items()},
        }
        options.json.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    return 0


def _show(found: dict[str, dict[str, Measured]], columns: Sequence[str]) -> None:
    table = Table("text", *columns, title="loss, nats a token", title_justify="left")
    for name, row in found.items():
        best = min(columns, key=lambda column: row[column].nats)
        table.add_row(
            name, *(f"[bold]{row[c].nats:.3f}[/bold]" if c == best else f"{row[c].nats:.3f}" for c in columns)
        )
    console.print(table)
    speeds = (f"{c} {np.median([row[c].speed for row in found.values()]):,.0f}" for c in ("base", "mixture"))
    console.print(f"tokens a second, median over texts: {', '.join(speeds)}")


def _show_generated(found: dict[str, Generated], count: int) -> None:
    table = Table(
        "by", "same tokens", "tokens a second", "times as long", title=f"{count} tokens, greedily", title_justify="left"
    )
    for way, made in found.items():
        table.add_row(way, f"{made.same} of {made.prompts}", f"{made.speed:,.1f}", f"{made.longer:.2f}")
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
