"""Fuzz every file reader with damaged files. A finding is any outcome other than success or a UserError.

    python tests/stress/fuzz.py                                          all targets, 60 seconds in total
    python tests/stress/fuzz.py peft-config decision-log --runs 100000   two targets
    python tests/stress/fuzz.py --list                                   list the targets
    python tests/stress/fuzz.py decision-log --input FILE                run one input again, with its traceback

A finding's input is written to CORPUS/findings. With Atheris installed (pip install atheris), the search is guided by code
coverage. Without it, the search is guided by the places where errors are raised, and is deterministic for a given seed.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import tempfile
from pathlib import Path

from fuzzing import campaign, engines
from fuzzing.campaign import SearchOptions
from fuzzing.target import TARGETS

from dylora_mlx.cli.parser import Parser, run_command

DEFAULT = Path(tempfile.gettempdir()) / "dylora-fuzz"


def options(argv: list[str]) -> argparse.Namespace:
    """Parse and check the command line. Resolves `--engine auto`."""
    parser = Parser("python tests/stress/fuzz.py", __doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="names of targets (default: all)")
    parser.add_argument("--runs", type=int, default=10**9, help="maximum number of executions of each target")
    parser.add_argument("--seconds", type=float, default=60.0, help="total time, divided among the targets by weight")
    parser.add_argument("--engine", choices=["auto", "atheris", "random"], default="auto")
    parser.add_argument(
        "--corpus",
        type=Path,
        default=DEFAULT,
        metavar="DIR",
        help=f"folder of inputs and findings (default: {DEFAULT})",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print a Markdown table of the results at the end")
    parser.add_argument("--list", action="store_true", help="list the targets, and exit")
    parser.add_argument("--input", type=Path, metavar="FILE", help="run one input of one target, and exit")
    for name in ("box", "module"):  # internal: passed to the process that searches one target
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.engine == "auto":
        args.engine = "atheris" if importlib.util.find_spec("atheris") else "random"
    elif args.engine == "atheris" and not importlib.util.find_spec("atheris"):
        parser.error("--engine atheris: Atheris is not installed (pip install atheris)")
    if args.box is None:
        # Not in a process that searches: Atheris instrumentation has to wrap the import of the target's module there.
        from fuzzing import every  # noqa: F401

        if unknown := [name for name in args.targets if name not in TARGETS]:
            parser.error(f"{', '.join(unknown)}: no such target, there are {', '.join(TARGETS)}")
        if args.input is not None and len(args.targets) != 1:
            parser.error("--input: name the one target that reads it")
        if args.input is not None and not args.input.is_file():
            parser.error(f"--input {args.input}: no such file")
        if args.runs < 1 or not 0 < args.seconds < math.inf:
            parser.error("--runs must be at least 1 and --seconds above 0")
        if any(path.exists() and not path.is_dir() for path in (args.corpus, *args.corpus.parents)):
            parser.error(f"--corpus {args.corpus}: a file is in the way; choose another folder")
    return args


def again(name: str, path: Path) -> int:
    """Run one input again and return the exit code. The exception of a finding is not caught, for its traceback."""
    with campaign.scratch() as work_dir:
        _, target_function = TARGETS[name].make(work_dir)
        outcome = engines.Search(target_function).run_once(path.read_bytes())
        print(f"{name}: {outcome.finding or 'no finding'} {f'[{outcome.location}]' if outcome.location else ''}")
        if outcome.finding:
            target_function(path.read_bytes())
    return 1 if outcome.finding else 0


def command(argv: list[str]) -> int:
    args = options(argv)
    if args.list:
        for target in TARGETS.values():
            print(f"{target.name:22}{target.form:13}{target.about}")
        return 0
    if args.input is not None:
        return again(args.targets[0], args.input)
    search_options = SearchOptions(args.runs, args.seconds, args.engine, args.corpus.absolute(), args.seed)
    if args.box is not None:
        campaign.work(args.targets[0], args.module, search_options, Path(args.box))
        return 0
    chosen = [TARGETS[name] for name in (args.targets or TARGETS)]
    search_options.corpus.mkdir(parents=True, exist_ok=True)
    executions, findings, rows = 0, [], []
    weights = sum(target.weight for target in chosen)
    for target in chosen:
        target_options = search_options._replace(seconds=max(1.0, search_options.seconds * target.weight / weights))
        result = campaign.search(target.name, target_options, [sys.executable, str(Path(__file__))])
        executions += result.executions
        rate = result.executions / max(result.seconds, 1e-9)
        print(
            f"{target.name:22}{result.executions:12,} executions {rate:9,.0f}/s {len(result.findings):4} findings",
            flush=True,
        )
        rows.append(f"| `{target.name}` | {result.executions:,} | {rate:,.0f} | {len(result.findings)} |")
        for path, description in result.findings:
            findings.append(path)
            print(f"    {description}\n    again: python tests/stress/fuzz.py {target.name} --input {path}", flush=True)
    if args.table:
        print(
            "\n".join(["", "| target | executions | a second | findings |", "| --- | ---: | ---: | ---: |", *rows, ""])
        )
    print(f"{executions:,} executions of {len(chosen)} targets by {search_options.engine}: {len(findings)} findings")
    return 1 if findings else 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
