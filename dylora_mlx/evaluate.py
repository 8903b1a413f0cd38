"""Evaluate a run: losses of its domains, accuracy on multiple-choice questions, pass@k, or tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.errors import UserError
from dylora_mlx.system.files import check_output_file, write_json

if TYPE_CHECKING:
    from dylora_mlx.run.run_folder import OpenedRun

EXAMPLES = """  python -m dylora_mlx.evaluate runs/quickstart
  python -m dylora_mlx.evaluate runs/quickstart --data notes=notes.jsonl --json losses.json
  python -m dylora_mlx.evaluate runs/my --options --data boolq=boolq/test.jsonl
  python -m dylora_mlx.evaluate runs/my --problems mbpp/test.jsonl --allow-code-execution
  python -m dylora_mlx.evaluate runs/my --problems HumanEval.jsonl --samples 20 --temp 0.8 --k 1 10 --allow-code-execution
  python -m dylora_mlx.evaluate runs/my --tasks arc_easy,piqa --limit 200 --experts
  python -m dylora_mlx.evaluate runs/my --tasks quiz --include-path my-tasks --output results
"""

USED_BY = {
    "--problems": ("samples", "k", "temp", "top_p", "max_tokens", "limit", "shots", "timeout", "seed"),
    "--options": ("greedy", "limit"),
    "--tasks": (
        "include_path", "num_fewshot", "apply_chat_template", "expert", "experts", "output", "max_tokens", "limit", "seed",
    ),
}  # fmt: skip
"""Options that only some kinds of evaluation use, by the option that asks for that kind. Without one losses are measured."""


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
    add(
        "--tasks",
        metavar="NAMES",
        help="tasks of lm-evaluation-harness, separated by commas: names, groups, patterns, or YAML files",
    )
    add("--include-path", type=Path, metavar="FOLDER", help="folder with more tasks, as YAML files")
    add(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="solved examples in each prompt of a task, instead of the task's own",
    )
    add("--apply-chat-template", action="store_true", help="ask the tasks' questions as chats")
    add(
        "--expert",
        action="append",
        default=[],
        metavar="NAME",
        help="also evaluate this expert alone (may be repeated)",
    )
    add("--experts", action="store_true", help="also evaluate every expert alone")
    add(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="write results as lm-evaluation-harness does, a file for each model",
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
    add(
        "--max-tokens",
        type=int,
        default=256,
        help="maximum number of tokens per completion; with --tasks, where the task names none",
    )
    add(
        "--limit",
        type=int,
        help="use only the first problems, questions of each domain, or documents of each task, at most this many",
    )
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
    _check_kind(parser, options)
    return options


def _check_kind(parser: Parser, options: argparse.Namespace) -> None:
    """Raise UserError for two kinds of evaluation at once, and for an option that the chosen kind does not use."""
    chosen = [kind for kind in USED_BY if getattr(options, kind[2:]) not in (None, False)]
    if len(chosen) > 1:
        raise UserError(f"{chosen[0]} and {chosen[1]} exclude each other; run the command twice")
    for name in dict.fromkeys(name for names in USED_BY.values() for name in names):
        kinds = [kind for kind, names in USED_BY.items() if name in names]
        if getattr(options, name) != parser.get_default(name) and not {*chosen} & {*kinds}:
            needed = kinds[0] if len(kinds) == 1 else "one of them"
            raise UserError(f"--{name.replace('_', '-')} is for {' and '.join(kinds)}; leave it out or add {needed}")
    if options.tasks is not None and (options.data or options.split != parser.get_default("split")):
        raise UserError("--tasks brings its own data; leave out --data and --split")


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
    _check_task_options(options)
    if options.json:
        check_output_file(options.json)


def _check_task_options(options: argparse.Namespace) -> None:
    """Check the options of --tasks. Raises UserError."""
    if options.tasks is not None and not all(name.strip() for name in options.tasks.split(",")):
        raise UserError(f"--tasks '{options.tasks}': give names separated by commas, such as arc_easy,piqa")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise UserError(f"--num-fewshot {options.num_fewshot}: below 0")
    if options.include_path and not options.include_path.is_dir():
        raise UserError(f"--include-path {options.include_path}: no such folder")
    if options.expert and options.experts:
        raise UserError("--expert and --experts: the second means all of them; leave one out")
    if options.output:
        check_output_file(options.output / "results.json", make_parents=True)


def command(argv: list[str]) -> int:
    options = parse(argv)
    if options.tasks is not None and not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of the harness and of datasets, as ours: in terminals only
    # Imported after parsing: --help needs no MLX.
    from dylora_mlx.evaluation import code, harness, questions
    from dylora_mlx.evaluation.losses import domain_losses, evaluation_domains, print_losses
    from dylora_mlx.model.base import device
    from dylora_mlx.run import run_folder

    if options.tasks is not None:
        harness.check_installed()
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
    elif options.tasks is not None:
        figures = _evaluate_tasks(run, options)
    else:
        losses = dict(domain_losses(run, evaluation_domains(run.config, options.data), options.split))
        print_losses(losses)
        figures = {name: {**loss._asdict(), "best": loss.best} for name, loss in losses.items()}
    if options.json:
        write_json(options.json, figures)
    return 0


def _evaluate_tasks(run: OpenedRun, options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate tasks of lm-evaluation-harness, print and write their results, and return the figures for --json."""
    from dylora_mlx.evaluation import harness

    models = harness.choose_models(run, options.expert, options.experts)
    names = [name.strip() for name in options.tasks.split(",")]
    tasks = harness.load_tasks(names, options.include_path, options.num_fewshot)
    settings = harness.HarnessSettings(
        options.num_fewshot, options.limit, options.apply_chat_template, options.max_tokens, options.seed
    )
    found = harness.evaluate_tasks(run, tasks, models, settings)
    harness.print_results(found)
    if options.output:
        harness.write_results(found, options.output)
    return harness.to_json(found)


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
