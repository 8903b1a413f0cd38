"""Feed every reader of files with damaged ones: anything but a success or a UserError is a finding.

    python tests/stress/fuzz.py                                    every target, 60 seconds in all
    python tests/stress/fuzz.py peft-config ledger --runs 100000   some of them
    python tests/stress/fuzz.py --list                             what there is
    python tests/stress/fuzz.py ledger --input FILE                one input again, with its traceback

A finding's input is written to CORPUS/findings. With Atheris installed (pip install atheris) the search follows coverage;
without, it follows the places that errors come from, the same way for the same seed.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import tempfile
from pathlib import Path

from fuzzing import campaign, engines
from fuzzing.campaign import Asked
from fuzzing.target import TARGETS

from dylora_mlx.cli.parser import Parser, run_command

DEFAULT = Path(tempfile.gettempdir()) / "dylora-fuzz"


def options(argv: list[str]) -> argparse.Namespace:
    made = Parser("python tests/stress/fuzz.py", __doc__)
    made.add_argument("targets", nargs="*", metavar="TARGET", help="names of targets (default: all)")
    made.add_argument("--runs", type=int, default=10**9, help="executions of each target, at most")
    made.add_argument(
        "--seconds", type=float, default=60.0, help="time of all targets together, shared by their weights"
    )
    made.add_argument("--engine", choices=["auto", "atheris", "random"], default="auto")
    made.add_argument(
        "--corpus", type=Path, default=DEFAULT, metavar="DIR", help=f"inputs and findings (default: {DEFAULT})"
    )
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--table", action="store_true", help="end with a Markdown table of what was done")
    made.add_argument("--list", action="store_true", help="name the targets and leave")
    made.add_argument("--input", type=Path, metavar="FILE", help="execute one input of one target, and leave")
    for name in ("box", "module"):  # of a process that searches one target
        made.add_argument(f"--{name}", help=argparse.SUPPRESS)
    found = made.parse_args(argv)
    if found.engine == "auto":
        found.engine = "atheris" if importlib.util.find_spec("atheris") else "random"
    elif found.engine == "atheris" and not importlib.util.find_spec("atheris"):
        made.error("--engine atheris: it is not installed (pip install atheris)")
    if found.box is None:
        from fuzzing import every  # noqa: F401  (Atheris must see the imports of a process that searches)

        if unknown := [name for name in found.targets if name not in TARGETS]:
            made.error(f"{', '.join(unknown)}: no such target, there are {', '.join(TARGETS)}")
        if found.input is not None and len(found.targets) != 1:
            made.error("--input: name the one target that reads it")
        if found.input is not None and not found.input.is_file():
            made.error(f"--input {found.input}: no such file")
        if found.runs < 1 or not 0 < found.seconds < math.inf:
            made.error("--runs must be at least 1 and --seconds above 0")
        if any(place.exists() and not place.is_dir() for place in (found.corpus, *found.corpus.parents)):
            made.error(f"--corpus {found.corpus}: a file is in its way; name another folder")
    return found


def again(name: str, path: Path) -> int:
    """One input, its error not caught."""
    with campaign.scratch() as place:
        _, run = TARGETS[name].make(place)
        found = engines.Search(run).once(path.read_bytes())
        print(f"{name}: {found.finding or 'no finding'} {f'[{found.place}]' if found.place else ''}")
        if found.finding:
            run(path.read_bytes())
    return 1 if found.finding else 0


def command(argv: list[str]) -> int:
    found = options(argv)
    if found.list:
        for target in TARGETS.values():
            print(f"{target.name:22}{target.form:13}{target.about}")
        return 0
    if found.input is not None:
        return again(found.targets[0], found.input)
    asked = Asked(found.runs, found.seconds, found.engine, found.corpus.absolute(), found.seed)
    if found.box is not None:
        campaign.work(found.targets[0], found.module, asked, Path(found.box))
        return 0
    chosen = [TARGETS[name] for name in (found.targets or TARGETS)]
    asked.corpus.mkdir(parents=True, exist_ok=True)
    everything, findings, rows = 0, [], []
    weights = sum(target.weight for target in chosen)
    for target in chosen:
        share = asked._replace(seconds=max(1.0, asked.seconds * target.weight / weights))
        done = campaign.search(target.name, share, [sys.executable, str(Path(__file__))])
        everything += done.executions
        rate = done.executions / max(done.seconds, 1e-9)
        print(
            f"{target.name:22}{done.executions:12,} executions {rate:9,.0f}/s {len(done.findings):4} findings",
            flush=True,
        )
        rows.append(f"| `{target.name}` | {done.executions:,} | {rate:,.0f} | {len(done.findings)} |")
        for path, said in done.findings:
            findings.append(path)
            print(f"    {said}\n    again: python tests/stress/fuzz.py {target.name} --input {path}", flush=True)
    if found.table:
        print(
            "\n".join(["", "| target | executions | a second | findings |", "| --- | ---: | ---: | ---: |", *rows, ""])
        )
    print(f"{everything:,} executions of {len(chosen)} targets by {asked.engine}: {len(findings)} findings")
    return 1 if findings else 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
