"""Compare kinds of gates on the features of a stream's skills: which finds the right expert, and which forgets less.

    python tools/benchmarks/compare_gates.py                                  the quickstart's skills, 5 seeds, 3 orders (a minute)
    python tools/benchmarks/compare_gates.py --config run.yaml --seeds 3 --json gates.json

No expert is trained: the features are the base's. Each kind is learned skill after skill from a bounded memory of
features, all rows anew each time (refitted) or the newcomer's alone (frozen).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import numpy as np
from methods import gates
from methods.bench import Bench, ordered, owners
from methods.gates import Found, Remembered
from rich.console import Console
from rich.table import Table

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.config.load import config_from_files
from dylora_mlx.config.yaml_files import find_config
from dylora_mlx.data.stream import Split
from dylora_mlx.errors import UserError
from dylora_mlx.model.base import device
from dylora_mlx.model.base.load import load_base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.training.skill.base_pass import base_states


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python tools/benchmarks/compare_gates.py", __doc__)
    add = parser.add_argument
    add("--config", default="quickstart", help="a YAML file, or the name of a shipped config")
    add("--seeds", type=int, default=5, help="seeds 0 to N - 1: of splits, features and rows")
    add("--orders", type=int, default=3, help="orders of the skills, one a seed in turn")
    add("--same", nargs="*", default=["requests,requests_more"], metavar="NAME,NAME", help="skills that are one")
    add("--json", type=Path, help="write the figures of every seed to a file")
    options = parser.parse_args(argv)
    for name in ("seeds", "orders"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def features(model: RoutedDecoder, bench: Bench, split: Split, number: int) -> np.ndarray:
    """float32 [m, D]: as many positions as the memory holds, drawn from all of a split's."""
    training = bench.config.training
    passed = base_states(model, split.segments, bench.config.data.max_seq_length, training.batch_size)
    found = np.concatenate([states.features for states in passed])
    rng = np.random.default_rng([bench.seed, 22, number])
    return found[rng.permutation(len(found))[: training.memory_tokens]]


def remembered(bench: Bench) -> list[Remembered]:
    """What the base knows in column 0, then the skills in their order."""
    model, found = bench.model(), []
    for number, skill in enumerate((bench.known, *bench.skills)):
        expert_id = 1 + bench.owners[skill.name] if number else 0
        learned, held_out = (features(model, bench, split, number) for split in (skill.train, skill.validation))
        found.append(Remembered(skill.name, learned, held_out, expert_id))
    return found


def measure(options: argparse.Namespace) -> dict[str, list[Found]]:
    """What each kind came to, seed by seed."""
    config = config_from_files([find_config(options.config)], {})
    assert config is not None
    if config.growth.base_skill is None:
        raise UserError("growth.base_skill is null; the gate's first row is learned from its text, name one")
    device.set_memory_limits()
    base = load_base(config.model.base, config.model.dtype)
    found: dict[str, list[Found]] = {}
    for seed in range(options.seeds):
        stream = ordered(config, seed % options.orders)
        skills = remembered(Bench.of(base, stream, owners(stream, options.same), seed))
        for kind in gates.KINDS:
            for frozen in (False, True):
                name = f"{kind}, {'newcomer alone' if frozen else 'all rows'}"
                result = gates.course(kind, skills, frozen, config.training.router_fit_steps, seed)
                found.setdefault(name, []).append(result)
    return found


def table(found: dict[str, list[Found]]) -> Table:
    shown = Table("gate, rows learned", "right, %", "lost, points", "own gate", title="means over seeds (their range)")
    for name, results in found.items():
        cells = []
        for field, scale, digits in (("right", 100, 1), ("lost", 100, 1), ("own", 1, 3)):
            values = [scale * getattr(result, field) for result in results]
            cells.append(f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})")
        shown.add_row(name, *cells)
    return shown


def command(argv: list[str]) -> int:
    options = parse(argv)
    found = measure(options)
    Console(width=100).print(table(found))
    if options.json:
        kept = {name: [result._asdict() for result in results] for name, results in found.items()}
        options.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
