"""Measure a run: losses of its domains, and the share of code problems that its completions solve."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.errors import UserError
from dylora_mlx.system.files import check_output_file, write_json

EXAMPLES = """  python -m dylora_mlx.evaluate runs/quickstart
  python -m dylora_mlx.evaluate runs/quickstart --data notes=notes.jsonl --json losses.json
  python -m dylora_mlx.evaluate runs/my --problems mbpp/test.jsonl --allow-code-execution
  python -m dylora_mlx.evaluate runs/my --problems HumanEval.jsonl --samples 20 --temp 0.8 --k 1 10 --allow-code-execution
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python -m dylora_mlx.evaluate", __doc__, EXAMPLES)
    add = parser.add_argument
    add("run", type=Path, help="a run folder")
    add("--data", action="append", default=[], metavar="NAME=SOURCE", help="a further domain (may be repeated)")
    add("--split", choices=["validation", "test"], default="test", help="of the data")
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
    if not options.problems:
        _check_losses(parser, options)
    return options


def _check_losses(parser: Parser, options: argparse.Namespace) -> None:
    """Options that losses have no use for are a mistake, not noise."""
    for name in ("samples", "k", "temp", "top_p", "max_tokens", "limit", "shots", "timeout", "seed"):
        if getattr(options, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} is for --problems; losses do without it")


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
        if not 0 < getattr(options, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: not above 0")
    if min(options.k) < 1 or options.shots < 0 or not 0 <= options.temp < math.inf:
        raise UserError("--k is at least 1, --shots and --temp at least 0")
    if not 0 <= options.top_p <= 1 or not 0 <= options.seed < 2**31:
        raise UserError(
            f"--top-p {options.top_p} is not from 0 to 1, or --seed {options.seed} not from 0 to {2**31 - 1}"
        )
    if options.json:
        check_output_file(options.json)


def command(argv: list[str]) -> int:
    options = parse(argv)
    from dylora_mlx.evaluation import code
    from dylora_mlx.evaluation.losses import domain_losses, evaluation_domains, print_losses
    from dylora_mlx.model.base import device
    from dylora_mlx.run import run_folder  # only now: --help needs no MLX

    run = run_folder.open_run(options.run, whole=False)
    device.set_memory_limits()
    if options.problems:
        how = code.PassAtKSettings(options.samples, options.k, options.temp, options.top_p, options.max_tokens, options.timeout,
                       options.seed)  # fmt: skip
        figures = code.measure_pass_at_k(run, options.problems, options.shots, options.limit, how)
        code.print_pass_at_k(figures, options.problems.name, how)
    else:
        found = dict(domain_losses(run, evaluation_domains(run.config, options.data), options.split))
        print_losses(found)
        figures = {name: {**loss._asdict(), "best": loss.best} for name, loss in found.items()}
    if options.json:
        write_json(options.json, figures)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
