"""Learning rates: every method at several rates on development skills, and the best rate of each method.

A folder of rates holds one folder of results per rate, such as rate-0.001.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from dylora_mlx.config import Config
from dylora_mlx.errors import UserError
from methods import results

Finals = dict[str, dict[float, results.Mean]]
"""Final mean of the skills by method and learning rate."""
_PREFIX = "rate-"


def with_rate(config: Config, rate: float) -> Config:
    """Return the config with another training.learning_rate. Raises ValueError for a rate that it refuses."""
    return replace(config, training=replace(config.training, learning_rate=rate))


def place(folder: Path, rate: float) -> Path:
    """Return the folder of a rate's results."""
    return folder / f"{_PREFIX}{rate:g}"


def read(folder: Path) -> Finals:
    """Return the final means of all methods and rates in a folder. Raises UserError if it holds none."""
    finals: Finals = {}
    for path in sorted(folder.glob(f"{_PREFIX}*")):
        cells = results.read(path)
        for method in {cell.method for cell in cells}:
            values = [results.final(cell) for cell in cells if cell.method == method]
            finals.setdefault(method, {})[float(path.name.removeprefix(_PREFIX))] = results.mean(values)
    if not finals:
        raise UserError(f"{folder}: no results of --learning-rates; compute them there first")
    return {method: dict(sorted(by_rate.items())) for method, by_rate in finals.items()}


def best(finals: Finals, methods: Iterable[str]) -> dict[str, float]:
    """Return the rate with the lowest final mean of each method. Raises UserError for a method without results."""
    missing = [method for method in methods if method not in finals]
    if missing:
        raise UserError(f"--rates-from: no results of '{missing[0]}' there; compute it at --learning-rates first")
    return {method: _lowest(finals[method]) for method in methods}


def markdown(finals: Finals, order: Mapping[str, int]) -> str:
    """Return a Markdown table of methods by rates, in the given order of methods, each method's best value in bold."""
    rates = sorted({rate for by_rate in finals.values() for rate in by_rate})
    lines = [
        "Mean validation loss of the skills at the end, nats per token, by learning rate; the best of each method in bold.",
        "",
        "| method | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "| --- |" + " ---: |" * len(rates),
    ]
    for method in sorted(finals, key=lambda name: order.get(name, len(order))):
        by_rate, texts = finals[method], []
        for rate in rates:
            text = f"{by_rate[rate].value:.3f}" if rate in by_rate else "-"
            texts.append(f"**{text}**" if rate == _lowest(by_rate) else text)
        lines.append(f"| {method} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def _lowest(by_rate: Mapping[float, results.Mean]) -> float:
    return min(by_rate, key=lambda rate: by_rate[rate].value)
