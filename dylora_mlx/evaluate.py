"""Evaluate a run: the losses of its domains, accuracy on multiple-choice questions, or pass@k on code problems."""

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
  python -m dylora_mlx.evaluate runs/my --options --data boolq=boolq/test.jsonl
  python -m dylora_mlx.evaluate runs/my --problems mbpp/test.jsonl --allow-code-execution
  python -m dylora_mlx.evaluate runs/my --problems HumanEval.jsonl --samples 20 --temp 0.8 --k 1 10 --allow-code-execution
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python -m dylora_mlx.evaluate", __doc__, EXAMPLES)
    add = parser.add_argument
    add("run", type=Path, help="run folder")
    add(
        "--data",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="additional domain to evaluate (may be repeated)",
    )
    add("--split", choices=["validation", "test"], default="test", help="split of the domains to evaluate")
    add(
        "--options",
        action="store_true",
        help="measure accuracy instead of losses, on the domains whose records have a column 'options'",
    )
    add("--greedy", action="store_true", help="with --options: generate the answers too")
    add(
        "--problems",
        type=Path,
        help="JSONL file with the columns of MBPP or HumanEval: measure pass@k on it instead of losses",
    )
    add(
        "--allow-code-execution",
        action="store_true",
        help="allow generated programs to run in the sandbox; --problems requires it",
    )
    add("--samples", type=int, default=1, help="completions per problem, at least the largest k")
    add("--k", type=int, nargs="+", default=[1], help="one or more k to report pass@k for")
    add("--temp", type=float, default=0.0, help="sampling temperature; 0 is greedy")
    add(
        "--top-p",
        type=float,
        default=0.95,
        help="nucleus sampling: sample from the likeliest tokens that together have this probability",
    )
    add("--max-tokens", type=int, default=256, help="maximum number of tokens per completion")
    add("--limit", type=int, help="use only the first problems, or questions of each domain, at most this many")
    add(
        "--shots",
        type=int,
        default=0,
        help="MBPP only: solved problems in each prompt, taken from the beginning of the file",
    )
    add("--timeout", type=float, default=5.0, help="time limit of one program in seconds")
    add("--seed", type=int, default=0, help="seed of the sampling")
    add("--json", type=Path, help="write the results to this JSON file")
    options = parser.parse_args(argv)
    _check_options(options)
    if options.problems and options.options:
        raise UserError("--problems and --options exclude each other; run the command twice")
    if options.greedy and not options.options:
        raise UserError("--greedy is for --options; leave it out or add --options")
    if not options.problems:
        _reject_problem_options(parser, options)
    return options


def _reject_problem_options(parser: Parser, options: argparse.Namespace) -> None:
    """Raise UserError for an option that only --problems uses."""
    for name in ("samples", "k", "temp", "top_p", "max_tokens", "limit", "shots", "timeout", "seed"):
        if name == "limit" and options.options:
            continue
        if getattr(options, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} is for --problems; leave it out or add --problems")


def _check_options(options: argparse.Namespace) -> None:
    """Check ranges and combinations of options. Raises UserError."""
    if options.problems and not options.allow_code_execution:
        raise UserError(
            "--problems runs programs that a model wrote, in a sandbox; add --allow-code-execution to allow that"
        )
    if options.problems and (largest_k := max(options.k)) > options.samples:
        raise UserError(f"--k {largest_k}: needs at least {largest_k} --samples of each problem")
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
    # Imported after parsing: --help needs no MLX.
    from dylora_mlx.evaluation import code, questions
    from dylora_mlx.evaluation.losses import domain_losses, evaluation_domains, print_losses
    from dylora_mlx.model.base import device
    from dylora_mlx.run import run_folder

    run = run_folder.open_run(options.run, load_experts=False)
    device.set_memory_limits()
    if options.problems:
        settings = code.PassAtKSettings(options.samples, options.k, options.temp, options.top_p, options.max_tokens, options.timeout,
                       options.seed)  # fmt: skip
        figures = code.measure_pass_at_k(run, options.problems, options.shots, options.limit, settings)
        code.print_pass_at_k(figures, options.problems.name, settings)
    elif options.options:
        sources = evaluation_domains(run.config, options.data)
        tasks = dict(questions.task_accuracies(run, sources, options.split, options.limit, options.greedy))
        questions.print_accuracies(tasks)
        figures = {name: questions.to_json(task) for name, task in tasks.items()}
    else:
        losses = dict(domain_losses(run, evaluation_domains(run.config, options.data), options.split))
        print_losses(losses)
        figures = {name: {**loss._asdict(), "best": loss.best} for name, loss in losses.items()}
    if options.json:
        write_json(options.json, figures)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
