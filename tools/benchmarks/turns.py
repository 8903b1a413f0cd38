"""How well a run follows texts that turn from one skill to another: its loss after a turn, and whose gate is largest.

    python tools/benchmarks/turns.py runs/quickstart runs/other --json turns.json

The texts are spliced from the held-out documents of the run's own skills: pieces of 40 to 100 tokens, each of another
skill than the one before. The base's text counts as a skill, whose expert is the base. The same texts are read with every
token sent to the expert of its skill, which the router cannot know.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.exporting import formats
from dylora_mlx.model.decoder import attention
from dylora_mlx.run.build import own_sources
from dylora_mlx.run.run_folder import OpenedRun, open_run
from dylora_mlx.training.skill import turns
from dylora_mlx.training.skill.turns import Exemplars

SOON = 20
"""Tokens right after a turn, which are reported on their own."""


class Following(NamedTuple):
    """Figures over all tokens after the first turn of a text."""

    loss: float
    """Nats per token."""
    loss_soon: float
    """Nats per token of the first SOON tokens after each turn."""
    right_soon: float
    """Share of these whose largest gate is that of their skill's expert."""
    right_later: float
    """The same of the tokens after them."""
    oracle_loss: float
    """Nats per token with every token sent to the expert of its skill."""
    tokens: int


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


def command(argv: list[str]) -> int:
    parser = Parser("python tools/benchmarks/turns.py", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="finished runs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the texts (default: 0)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(argv)
    results = {str(folder): follow(open_run(folder), options.seed) for folder in options.runs}
    show(results)
    if options.json:
        text = json.dumps({name: result._asdict() for name, result in results.items()}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0


def show(results: dict[str, Following]) -> None:
    """Print one row for each run."""
    table = Table(
        "run", "loss after a turn", f"first {SOON}", f"right, first {SOON}", "right later", "oracle loss", "tokens"
    )
    for name, result in results.items():
        losses, shares = (f"{result.loss:.3f}", f"{result.loss_soon:.3f}"), (result.right_soon, result.right_later)
        table.add_row(
            name, *losses, *(f"{share:.0%}" for share in shares), f"{result.oracle_loss:.3f}", str(result.tokens)
        )
    Console(width=120).print(table)


def follow(run: OpenedRun, seed: int) -> Following:
    """Measure a run on texts that are spliced from its held-out documents."""
    texts = turns.splice(held_out(run), run.config.data.max_seq_length, np.random.default_rng(seed))
    routing = formats.mixture_routing(run).routing
    adapters = run.model.adapters(routing.top_k)
    losses, oracle_losses, right, since = [], [], [], []
    for tokens, experts in texts:
        inputs = mx.array(tokens[None, :-1])
        layout = attention.attention_layout(np.ones(inputs.shape, np.int32), run.model.window)
        own = mx.array(np.maximum(experts[None, :-1], 0))
        forced = (own[..., None] == mx.arange(len(run.pool) + 1)).astype(mx.float32)
        routed = run.model(inputs, layout, routing, adapters=adapters)
        ideal = run.model(inputs, layout, routing, gates=forced, adapters=adapters)
        # The last token of a piece predicts the first of the next, which no expert can know.
        counted = (experts[:-1] >= 0) & (experts[:-1] == experts[1:])
        losses.append(_token_losses(run, routed.hidden, tokens)[counted])
        oracle_losses.append(_token_losses(run, ideal.hidden, tokens)[counted])
        right.append((np.array(routed.gates[0].argmax(-1)) == experts[:-1])[counted])
        since.append(_tokens_since_turn(experts[:-1])[counted])
    soon = np.concatenate(since) < SOON
    loss, is_right = np.concatenate(losses), np.concatenate(right)
    return Following(
        float(loss.mean()),
        float(loss[soon].mean()),
        float(is_right[soon].mean()),
        float(is_right[~soon].mean()),
        float(np.concatenate(oracle_losses).mean()),
        len(loss),
    )


def held_out(run: OpenedRun) -> list[Exemplars]:
    """Return the validation and test documents of each skill that the run's library remembers."""
    owner = {entry.skill: entry.expert for entry in run.library.entries}
    sources = [source for source in own_sources(run.config) if source.name in owner]
    return [
        Exemplars([*skill.validation.segments, *skill.test.segments], owner[skill.name])
        for skill in run.read_sources(sources)
    ]


def _token_losses(run: OpenedRun, hidden: mx.array, tokens: np.ndarray) -> np.ndarray:
    """Return the loss of each next token, float64 [n - 1]."""
    logits = run.model.logits(hidden[0]).astype(mx.float32)
    targets = mx.array(tokens[1:])[:, None]
    return np.array(mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets, axis=-1)[:, 0], np.float64)


def _tokens_since_turn(experts: np.ndarray) -> np.ndarray:
    """Return how many tokens of its piece lie before each token, int [n]."""
    begins = np.flatnonzero(np.diff(experts, prepend=experts[0] - 1))
    return np.arange(len(experts)) - begins[np.searchsorted(begins, np.arange(len(experts)), side="right") - 1]


if __name__ == "__main__":
    sys.exit(main())
