"""Measure a run: losses of its domains, and the share of code problems that its completions solve."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from rich.table import Table

from dylora_mlx import cli
from dylora_mlx.config import Source
from dylora_mlx.data import skills
from dylora_mlx.data import stream as streams
from dylora_mlx.errors import UserError
from dylora_mlx.evaluation import problems, sandbox
from dylora_mlx.evaluation.problems import Problem
from dylora_mlx.generation import decode, stream
from dylora_mlx.generation.decode import TokenRouted
from dylora_mlx.generation.stream import Piece, Sampling
from dylora_mlx.model import device
from dylora_mlx.model.router import Routing
from dylora_mlx.runs import Opened, open_run
from dylora_mlx.share import formats
from dylora_mlx.training import display, evaluate

EXAMPLES = """examples:
  python -m dylora_mlx.evaluate runs/quickstart
  python -m dylora_mlx.evaluate runs/quickstart --data notes=notes.jsonl --json losses.json
  python -m dylora_mlx.evaluate runs/my --problems mbpp/test.jsonl --allow-code-execution
  python -m dylora_mlx.evaluate runs/my --problems HumanEval.jsonl --samples 20 --temp 0.8 --k 1 10 --allow-code-execution
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dylora_mlx.evaluate", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("run", type=Path, help="a run folder")
    add("--data", action="append", default=[], metavar="NAME=SOURCE", help="a further domain (may be repeated)")
    add("--split", choices=["validation", "test"], default="test")
    add(
        "--problems",
        type=Path,
        help="a JSONL file with MBPP's or HumanEval's columns: measure pass@k instead of losses",
    )
    add("--allow-code-execution", action="store_true", help="run generated programs, fenced in, which pass@k needs")
    add("--samples", type=int, default=1, help="completions of each problem")
    add("--k", type=int, nargs="+", default=[1], help="pass@k for these k")
    add("--temp", type=float, default=0.0, help="sampling temperature; 0 is greedy")
    add("--top-p", type=float, default=0.95, help="for sampling")
    add("--max-tokens", type=int, default=256, help="of a completion")
    add("--limit", type=int, help="ask only so many problems")
    add("--shots", type=int, default=0, help="MBPP: solved problems before each, from the beginning of the file")
    add("--timeout", type=float, default=5.0, help="seconds a program may take")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--json", type=Path, help="write the figures to a file")
    options = parser.parse_args(argv)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    if options.problems and not options.allow_code_execution:
        raise UserError(
            "pass@k runs programs that a model wrote; they are fenced in, but say that you want that: --allow-code-execution"
        )
    if options.problems and (worst := max(options.k)) > options.samples:
        raise UserError(f"--k {worst}: needs at least {worst} --samples of each problem")
    if options.problems and options.samples > 1 and options.temp == 0:
        raise UserError("--samples above 1 are all the same at --temp 0; give a temperature such as 0.8")
    for name in ("samples", "max_tokens", "timeout", *(["limit"] if options.limit is not None else [])):
        if not getattr(options, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: not above 0")
    if min(options.k) < 1 or options.shots < 0 or options.temp < 0:
        raise UserError("--k is at least 1, --shots and --temp at least 0")


class Losses(NamedTuple):
    """nats a learned token: the base's, the mixture's, each expert's by name; and the learned tokens."""

    base: float
    mixture: float
    experts: dict[str, float]
    tokens: int

    @property
    def best(self) -> str:
        """The expert with the lowest loss."""
        return min(self.experts, key=lambda name: self.experts[name])


def losses(run: Opened, sources: list[Source], split: str) -> Iterator[tuple[str, Losses]]:
    """Losses of some domains, one after another. Raises UserError for a source that cannot be read."""
    how, names = formats.mixing(run), formats.named(run)
    routing, alone = Routing(how.top_k, mx.array(how.temperature)), Routing(None, mx.array(1.0))
    for source in sources:  # before anything is measured
        skills.locate(source)
    measure, adapters = evaluate.Measure(run.model, compiled=False), run.model.adapters()
    for source in sources:
        skill = streams.prepare(source, run.config.data, run.base.tokenizer, run.config.seed)
        rows = (run.config.data.row_length, run.config.training.batch_rows)
        domain = evaluate.domains({source.name: getattr(skill, split)}, *rows)[source.name]
        routed = evaluate.evaluate(run.model, domain, routing, None, adapters, measure)
        single = [
            evaluate.evaluate(run.model, domain, alone, column, adapters, measure).loss for column in range(len(names))
        ]
        yield source.name, Losses(single[0], routed.loss, dict(zip(names, single, strict=True)), routed.tokens)


def domains(run: Opened, data: list[str]) -> list[Source]:
    """The run's own, and what --data names."""
    known = [run.config.growth.base_skill] if run.config.growth.base_skill else []
    found = {source.name: source for source in (*known, *run.config.skills, *run.config.domains)}
    for value in data:
        name, _, source = value.partition("=")
        try:
            found[name] = Source(name=name, source=source)
        except ValueError as error:
            raise UserError(f"--data {value}: should be NAME=SOURCE such as sql=sql.jsonl ({error})") from error
    return list(found.values())


def show_losses(found: dict[str, Losses]) -> None:
    table = Table(title="loss in nats a token (perplexity)", title_justify="left")
    for name in ("text", "base", "mixture", "best expert", "which"):
        table.add_column(name, justify="left" if name in ("text", "which") else "right")
    for name, loss in found.items():
        values = (loss.base, loss.mixture, loss.experts[loss.best])
        table.add_row(name, *(f"{value:.3f} ({math.exp(value):.1f})" for value in values), loss.best)
    display.console.print(table)


Way = Callable[[], AbstractContextManager[Any]]
"""Makes a model to generate with; what is folded into the base for it is taken out at the end."""


def ways(run: Opened) -> dict[str, Way]:
    """The base, the mixture, and every expert by itself."""
    how, names = formats.mixing(run), formats.named(run)
    routing = Routing(how.top_k, mx.array(how.temperature))

    def alone(column: int) -> Way:
        gates = np.eye(len(names), dtype=np.float32)[column]
        return lambda: decode.folded(run.base, run.model, gates)

    found: dict[str, Way] = {name: alone(column) for column, name in enumerate(names)}
    return {"base": found.pop(formats.NULL), "mixture": lambda: nullcontext(TokenRouted(run.model, routing)), **found}


def solve(
    run: Opened, way: Way, asked: list[Problem], options: argparse.Namespace, tick: Callable[[], None]
) -> list[list[sandbox.Ran]]:
    """What became of every completion of every problem."""
    sampling = Sampling(options.temp, options.top_p if options.temp else 0.0)
    tokenizer, limits, found = run.base.tokenizer, sandbox.Limits(seconds=options.timeout), []
    mx.random.seed(options.seed)
    with way() as model:
        for problem in asked:
            ids = stream.encode(tokenizer, problem.prompt)
            room = min(options.max_tokens, run.base.context - len(ids))
            results = []
            for _ in range(options.samples):
                text = ""
                if room > 0:
                    pieces = stream.stream(model, tokenizer.loaded, ids, room, sampling, problem.stops)
                    text = "".join(piece.text for piece in pieces if isinstance(piece, Piece))
                results.append(sandbox.run(problem.program(text), limits))
            found.append(results)
            tick()
    return found


def code(run: Opened, options: argparse.Namespace) -> dict[str, Any]:
    """pass@k of the base, the mixture and every expert; prints a table, and returns the figures."""
    asked = problems.load(options.problems, options.shots)[: options.limit]
    found: dict[str, Any] = {}
    with display.progress() as progress:
        for name, way in ways(run).items():
            task = progress.add_task(name, total=len(asked), note="")
            ran = solve(run, way, asked, options, lambda task=task: progress.advance(task))
            counts = [(len(results), sum(r.passed for r in results)) for results in ran]
            why = [r.why for results in ran for r in results if not r.passed]
            found[name] = {
                **{f"pass@{k}": problems.mean_pass_at_k(counts, k) for k in options.k},
                "failed": {reason: why.count(reason) for reason in sorted(set(why))},
                "problems": {p.name: passed for p, (_, passed) in zip(asked, counts, strict=True)},
            }
    show_code(found, options, len(asked))
    return found


def show_code(found: dict[str, Any], options: argparse.Namespace, count: int) -> None:
    first = f"pass@{options.k[0]}"
    experts = [name for name in found if name not in ("base", "mixture")]
    best = max(experts, key=lambda name: found[name][first], default=None)
    title = (
        f"{count} problems of {options.problems.name}, {options.samples} completions each, temperature {options.temp:g}"
    )
    table = Table("", *(f"pass@{k}" for k in options.k), "failures", title=title, title_justify="left")
    for name in ("base", "mixture", *([best] if best else [])):
        label = f"best expert: {name}" if name == best else name
        failed = ", ".join(f"{why} {number}" for why, number in found[name]["failed"].items())
        table.add_row(label, *(f"{found[name][f'pass@{k}']:.1%}" for k in options.k), failed)
    display.console.print(table)


def command(argv: list[str]) -> int:
    options = parse(argv)
    run = open_run(options.run)
    device.prepare()
    if options.problems:
        figures = code(run, options)
    else:
        found = {}
        for name, loss in losses(run, domains(run, options.data), options.split):
            found[name] = loss
        show_losses(found)
        figures = {name: {**loss._asdict(), "best": loss.best} for name, loss in found.items()}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def main(argv: list[str] | None = None) -> int:
    return cli.guarded(command, argv)


if __name__ == "__main__":
    sys.exit(main())
