"""Compare kinds of gates on the features of a stream's skills: their routing accuracy, and how much they forget.

    python tools/benchmarks/compare_gates.py                                  the quickstart's skills, 5 seeds, 3 orders (a minute)
    python tools/benchmarks/compare_gates.py --config run.yaml --seeds 3 --json gates.json

No expert is trained; the features are the base's. Each gate is trained skill after skill on a bounded memory of
features. After each skill, either all rows are fitted again, or only the newest row.
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
from methods.gates import GateResult, Remembered
from rich.console import Console
from rich.table import Table

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.config.load import config_from_files
from dylora_mlx.config.yaml_files import find_config
from dylora_mlx.data.chat_template import resolve_template
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
    add("--seeds", type=int, default=5, help="number of seeds, from 0: for splits, features and rows")
    add("--orders", type=int, default=3, help="number of orders of the skills; the seeds take turns with them")
    add(
        "--same",
        nargs="*",
        default=["requests,requests_more"],
        metavar="NAME,NAME",
        help="skills that share one expert",
    )
    add("--json", type=Path, help="write the results of every seed to this file")
    options = parser.parse_args(argv)
    for name in ("seeds", "orders"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def features(model: RoutedDecoder, bench: Bench, split: Split, number: int) -> np.ndarray:
    """Return router features float32 [m, D] of a split: a random sample of as many positions as the memory holds."""
    training = bench.config.training
    batches = base_states(model, split.segments, bench.config.data.max_seq_length, training.batch_size)
    features = np.concatenate([states.features for states in batches])
    rng = np.random.default_rng([bench.seed, 22, number])
    return features[rng.permutation(len(features))[: training.memory_tokens]]


def remembered(bench: Bench) -> list[Remembered]:
    """Return the features of the base skill, with expert_id 0, then of the skills in their order."""
    model, skills = bench.model(), []
    for index, skill in enumerate((bench.known, *bench.skills)):
        expert_id = 1 + bench.owners[skill.name] if index else 0
        learned, held_out = (features(model, bench, split, index) for split in (skill.train, skill.validation))
        skills.append(Remembered(skill.name, learned, held_out, expert_id))
    return skills


def measure(options: argparse.Namespace) -> dict[str, list[GateResult]]:
    """Return the results of each kind of gate, one per seed. Raises UserError without a growth.base_skill."""
    config = config_from_files([find_config(options.config)], {})
    assert config is not None
    if config.growth.base_skill is None:
        raise UserError("growth.base_skill is null; set it: the gate's first row is trained on its text")
    device.set_memory_limits()
    base = load_base(config.model.base, config.model.dtype, resolve_template(config.data.chat_template))
    results: dict[str, list[GateResult]] = {}
    for seed in range(options.seeds):
        stream = ordered(config, seed % options.orders)
        skills = remembered(Bench.of(base, stream, owners(stream, options.same), seed))
        for kind in gates.KINDS:
            for frozen in (False, True):
                name = f"{kind}, {'newest row only' if frozen else 'all rows'}"
                result = gates.course(kind, skills, frozen, config.training.router_fit_steps, seed)
                results.setdefault(name, []).append(result)
    return results


def table(results: dict[str, list[GateResult]]) -> Table:
    table = Table("gate, trained rows", "right, %", "lost, points", "own gate", title="means over seeds (their range)")
    for name, per_seed in results.items():
        cells = []
        for field, scale, digits in (("right", 100, 1), ("lost", 100, 1), ("own", 1, 3)):
            values = [scale * getattr(result, field) for result in per_seed]
            cells.append(f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})")
        table.add_row(name, *cells)
    return table


def command(argv: list[str]) -> int:
    options = parse(argv)
    results = measure(options)
    Console(width=100).print(table(results))
    if options.json:
        values = {name: [result._asdict() for result in per_seed] for name, per_seed in results.items()}
        options.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
