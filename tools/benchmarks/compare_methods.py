"""Compare continual-learning methods on one stream of skills, with the same base, rows, steps and adapter parameters.

    python tools/benchmarks/compare_methods.py --out comparison                     every method, 5 seeds, 3 orders (hours on a CPU)
    python tools/benchmarks/compare_methods.py --out quick --seeds 1 --orders 1 --methods ours sequential joint
    python tools/benchmarks/compare_methods.py --out comparison --report            only the tables of existing results
    python tools/benchmarks/compare_methods.py --out rates --config dev.yaml --learning-rates 5e-4 1e-3 2e-3
    python tools/benchmarks/compare_methods.py --out comparison --rates-from rates  each method at its best rate of these

Results that are in the folder are not computed again, so an interrupted run can be continued, and more seeds can be
added. Order 0 is the config's, the others are shuffled. FOLDER gets table.md, results.json and, with plotly, page.html.
With --questions it also has accuracies, by the likelihood of each option. With --learning-rates it gets a folder of
results per rate and rates.md, a table of methods by rates.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from methods import apart, arrow, earlier, orthogonal, page, rates, results, sequential, tables
from methods.bench import Bench, Result, ordered, owners
from methods.ours import VARIANTS, ours
from methods.results import Cell
from rich.console import Console

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.config import Config
from dylora_mlx.config.load import config_from_files
from dylora_mlx.config.yaml_files import find_config
from dylora_mlx.data.chat_template import resolve_template
from dylora_mlx.errors import Failure, UserError
from dylora_mlx.model.base import device
from dylora_mlx.model.base.load import Base, load_base

console = Console()
SAME = ["requests,requests_more"]
"""Skills of the quickstart that share one expert, as groups of comma-separated names."""
ARROW = "Arrow, same experts"
Method = Callable[[Bench], Result]


class Shared:
    """Solo experts that several methods use, trained once per bench."""

    def __init__(self) -> None:
        self._cached: tuple[Bench, apart.SoloExperts] | None = None

    def experts(self, bench: Bench) -> apart.SoloExperts:
        if self._cached is None or self._cached[0] is not bench:
            self._cached = (bench, apart.experts(bench))
        return self._cached[1]


def methods() -> dict[str, Method]:
    """Return every method by name, in the order of the table."""
    shared = Shared()
    return {
        "base alone": apart.base_alone,
        "sequential LoRA": sequential.sequential,
        "sequential LoRA, replay": sequential.with_replay,
        "O-LoRA": orthogonal.orthogonal,
        "earlier attempt": earlier.earlier,
        ARROW: lambda bench: arrow.arrow(bench, shared.experts(bench)),
        **{name: partial(ours, changes=changes) for name, changes in VARIANTS.items()},
        "oracle, experts alone": lambda bench: apart.oracle(bench, shared.experts(bench)),
        "joint LoRA": sequential.joint,
    }


ORDERLESS = {"base alone", "joint LoRA"}
"""Methods that do not depend on the order of skills; they are computed for order 0 only."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python tools/benchmarks/compare_methods.py", __doc__)
    add, names = parser.add_argument, list(methods())
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder for results and tables")
    add("--config", default="quickstart", help="a YAML file, or the name of a shipped config")
    add("--seeds", type=int, default=5, help="number of seeds, from 0: for splits, weights and the order of documents")
    add("--orders", type=int, default=3, help="number of orders of the skills")
    add("--paired", action="store_true", help="one order per seed, in turn, instead of every order with every seed")
    add("--methods", nargs="+", metavar="NAME", help="some of (default: all that can run): " + "; ".join(names))
    add("--same", nargs="*", default=SAME, metavar="NAME,NAME", help="skills that share one expert")
    add(
        "--questions",
        type=int,
        default=0,
        metavar="N",
        help="also the accuracy on N test questions of each skill with options",
    )
    add("--learning-rates", nargs="+", type=float, metavar="RATE", help="compute every method at each of these rates")
    add("--rates-from", type=Path, metavar="FOLDER", help="every method at its best rate in this folder's results")
    add("--report", action="store_true", help="only write the tables of existing results")
    options = parser.parse_args(argv)
    for name in ("seeds", "orders"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if unknown := [name for name in options.methods or [] if name not in names]:
        parser.error(f"--methods: '{unknown[0]}' is none of: {'; '.join(names)}")
    if options.questions < 0:
        parser.error("--questions must be at least 0")
    if options.learning_rates and options.rates_from:
        parser.error("--learning-rates and --rates-from exclude each other")
    return options


def choose_methods(asked: list[str] | None, projections: Collection[str]) -> list[str]:
    """Return the methods to compute: those that are asked for, or all. Arrow is left out of all where it cannot run.

    Raises UserError if Arrow is asked for where it cannot run.
    """
    if asked is None:
        return [name for name in methods() if name != ARROW or not arrow.unsupported(projections)]
    if ARROW in asked:
        arrow.check(projections)
    return asked


def todo(options: argparse.Namespace, folder: Path) -> Iterator[tuple[int, int, str]]:
    """Yield (seed, order, method) of each result missing in a folder, seed by seed. Order-independent methods may repeat."""
    for seed in range(options.seeds):
        for order in [seed % options.orders] if options.paired else range(options.orders):
            for name in options.methods:
                number = 0 if name in ORDERLESS else order
                if not results.place(folder, name, seed, number).exists():
                    yield seed, number, name


def compute(
    options: argparse.Namespace, folder: Path, config: Config, base: Base, rate_of: Mapping[str, float]
) -> None:
    """Compute the results that are missing in a folder, and write each as soon as it is finished.

    Args:
        options: Parsed options.
        folder: Folder of the results.
        config: Config of the stream.
        base: Loaded base.
        rate_of: Learning rates of the methods that have another than the config's.
    """
    all_methods, bench, bench_key = methods(), None, None
    missing = list(dict.fromkeys(todo(options, folder)))
    for count, (seed, order, name) in enumerate(missing, 1):
        if bench is None or bench_key != (seed, order):
            stream = ordered(config, order)
            made = Bench.of(base, stream, owners(stream, options.same), seed, options.questions)
            bench, bench_key = made, (seed, order)
        rate = rate_of.get(name, config.training.learning_rate)
        if rate != bench.config.training.learning_rate:
            bench = replace(bench, config=rates.with_rate(bench.config, rate))
        started = time.perf_counter()
        result = all_methods[name](bench)
        cell = Cell(name, seed, order, bench.names, bench.known.name, result, rate)
        results.write(folder, cell)
        seconds = time.perf_counter() - started
        console.print(
            f"{count}/{len(missing)}  seed {seed}, order {order}, rate {rate:g}, {name}: "
            f"{results.final(cell):.4f} nats, {seconds:.0f} s"
        )


def settle_on(
    options: argparse.Namespace, folder: Path, config: Config, base: Base, rate_of: Mapping[str, float]
) -> None:
    """Write the settings to the folder. Raises UserError if it holds results of other settings, or of another learning rate
    of a method in `rate_of`."""
    settings = {"base": base.fingerprint, "same": options.same, "config": asdict(config)}
    settings |= {"questions": options.questions} if options.questions else {}
    for cell in results.read(folder):
        if cell.method in rate_of and cell.learning_rate != rate_of[cell.method]:
            raise UserError(
                f"{folder}: its results of '{cell.method}' have the learning rate {cell.learning_rate:g}, not "
                f"{rate_of[cell.method]:g}; give another --out"
            )
    path, text = folder / "settings.json", json.dumps(settings, indent=1, sort_keys=True) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path}: the results in this folder are of other settings; give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def report_rates(folder: Path) -> None:
    """Write and print the table of methods by learning rates. Raises UserError without results."""
    text = rates.markdown(rates.read(folder), method_order())
    (folder / "rates.md").write_text(text, encoding="utf-8")
    print(text, end="")


def method_order() -> dict[str, int]:
    """Return each method's place in the tables."""
    return {name: number for number, name in enumerate(methods())}


def report(folder: Path) -> None:
    """Write and print the tables, and the HTML page if plotly is installed. Raises UserError without results."""
    cells = results.read(folder)
    if not cells:
        raise UserError(f"{folder}: no results; leave --report out to compute some")
    order = method_order()
    cells.sort(key=lambda cell: (order.get(cell.method, len(order)), cell.seed, cell.order))
    (folder / "table.md").write_text(tables.markdown(cells), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(tables.values(cells), indent=1) + "\n", encoding="utf-8")
    console.print(tables.rich_table(cells))
    if page.write(cells, folder / "page.html"):
        console.print(f"plots: {folder / 'page.html'}")
    else:
        console.print("no plots: pip install plotly")


def run(options: argparse.Namespace) -> None:
    """Compute the missing results, unless --report is given, and write the tables. Raises UserError for bad options."""
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"{options.out}: a file; --out takes a folder")
    if not options.report:
        config = config_from_files([find_config(options.config)], {})
        assert config is not None
        if config.growth.base_skill is None:
            raise UserError("growth.base_skill is null; set it: base retention is measured on its text")
        if options.same != SAME:
            _check_same(options.same, config)
        options.methods = choose_methods(options.methods, config.model.projection_names)
        device.set_memory_limits()
        base = load_base(config.model.base, config.model.dtype, resolve_template(config.data.chat_template))
        for folder, at_rate, rate_of in folders(options, config):
            settle_on(options, folder, at_rate, base, rate_of)
            compute(options, folder, at_rate, base, rate_of)
    if options.learning_rates or next(options.out.glob("rate-*"), None):
        report_rates(options.out)
    else:
        report(options.out)


def folders(options: argparse.Namespace, config: Config) -> list[tuple[Path, Config, dict[str, float]]]:
    """Return (folder, config, learning rates by method) of what is to be computed.

    One folder per rate with --learning-rates, and else --out. Raises UserError for a rate that the config refuses, or if
    --rates-from lacks a method.
    """
    if not options.learning_rates:
        found = rates.best(rates.read(options.rates_from), options.methods) if options.rates_from else {}
        return [(options.out, config, found)]
    try:
        return [(rates.place(options.out, rate), rates.with_rate(config, rate), {}) for rate in options.learning_rates]
    except ValueError as error:
        raise UserError(f"--learning-rates: {error}") from error


def _check_same(same: list[str], config: Config) -> None:
    names = {skill.name for skill in config.skills}
    for group in same:
        if "," not in group or not set(group.split(",")) <= names:
            raise UserError(
                f"--same {group}: give names of skills separated by commas, from {', '.join(sorted(names))}"
            )


def command(argv: list[str]) -> int:
    options = parse(argv)
    try:
        run(options)
    except KeyboardInterrupt:
        print("interrupted; finished results are kept", file=sys.stderr)
        return 130
    except (OSError, RuntimeError) as error:
        raise Failure(str(error)) from error
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
