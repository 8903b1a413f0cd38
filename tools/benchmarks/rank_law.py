"""Measure the LoRA rank that a skill needs: train a solo expert of each rank, fit a power law, write a rank schedule.

    python tools/benchmarks/rank_law.py --out ranks.json                the packaged SQL skill on the embedded base (minutes on a CPU)
    python tools/benchmarks/rank_law.py --skill notes.jsonl --base google/gemma-3-270m --steps 100 --out ranks.json --plot ranks.html
    python tools/benchmarks/rank_law.py --ranks 2 4 8 16 32 64 --seeds 0 1 2 3 --epsilon 0.005 --out ranks.json

Each expert trains alone, without a router, on the language-model loss only, for the same number of steps at every rank.
The law is fitted to the validation loss after the last step. `growth.rank.schedule: ranks.json` in a config uses the
schedule.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import mlx.core as mx
import numpy as np
from rich.table import Table

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.config import Config, ModelConfig, Source, TrainingConfig
from dylora_mlx.data import stream
from dylora_mlx.data.stream import Skill
from dylora_mlx.errors import UserError
from dylora_mlx.growth.rank import power_law
from dylora_mlx.growth.rank.power_law import PowerLaw
from dylora_mlx.growth.rank.schedule import RankSchedule, rank_schedule, save_schedule
from dylora_mlx.model.base import device
from dylora_mlx.model.base.load import Base, load_base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.kernels import numerics
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.system import blas, console
from dylora_mlx.system.files import check_output_file
from dylora_mlx.training.skill import solo
from dylora_mlx.training.step.domains import Domain, make_domains
from dylora_mlx.training.step.evaluate import Evaluator, evaluate

LARGEST_RANK = 4096


class Diverged(RuntimeError):
    """A validation loss is not finite."""


class Plan(NamedTuple):
    """Settings that are the same for every rank.

    The scale alpha / rank is constant. Then an expert padded with zeros is one of twice the rank with the same update,
    so the ranks are nested, as when training doubles an expert's rank. At a constant alpha, each factor would learn
    more slowly the larger the rank is.
    """

    base: Base
    config: Config
    skill: Skill
    validation: Domain
    steps: int
    """Training steps per rank and seed."""
    scale: float
    """alpha / rank."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python tools/benchmarks/rank_law.py", __doc__)
    add, model = parser.add_argument, ModelConfig()
    add("--skill", default="packaged/sql", help="packaged/NAME, a .jsonl file, a folder or a hub data set")
    add("--base", default=model.base, help="embedded, a folder or a hub id")
    add("--ranks", type=_count, nargs="+", default=[1, 2, 4, 8, 16, 32], help="at least three")
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help="seeds of the initial weights and of the order of the data",
    )
    add("--steps", type=_count, default=30, help="training steps per rank and seed")
    add("--limit", type=_count, help="use at most this many records of each split")
    add("--learning-rate", type=_positive, default=TrainingConfig().learning_rate, help="peak learning rate")
    add("--scale", type=_positive, default=model.alpha / model.rank, help="alpha / rank, the same for every rank")
    add("--epsilon", type=_positive, default=0.01, help="minimum gain, in nats per token, for which a rank is doubled")
    add("--out", type=Path, required=True, help="JSON file to write: the schedule and the measurements")
    add("--plot", type=Path, help="HTML file to write: points, fitted curve and interval (needs plotly)")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not a number above 0")


def check(options: argparse.Namespace) -> None:
    """Check before the sweep what would only fail after it. Raises UserError."""
    if len(set(options.ranks)) < max(3, len(options.ranks)):
        raise UserError("--ranks: at least three are needed, and none may come twice")
    if len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
        raise UserError("--seeds: none may come twice or be below 0")
    for name, maximum in (("ranks", LARGEST_RANK), ("seeds", 2**31 - 1)):
        if max(getattr(options, name)) > maximum:
            raise UserError(f"--{name}: {max(getattr(options, name))} is beyond {maximum}")
    for path in (p for p in (options.out, options.plot) if p is not None):
        check_output_file(path)
    if options.out == options.plot:
        raise UserError(f"{options.out}: --out and --plot are two files; name another for one of them")
    if options.plot is not None and importlib.util.find_spec("plotly") is None:
        raise UserError("--plot needs plotly: pip install plotly")


def prepare(options: argparse.Namespace) -> Plan:
    """Load the base and the skill. Raises UserError if either cannot be loaded."""
    try:
        source = Source(name="skill", source=options.skill, limit=options.limit)
        # A router at layer 0 needs no base pass; the router is not used here.
        model, training = (
            ModelConfig(base=options.base, router_layer=0),
            TrainingConfig(learning_rate=options.learning_rate),
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    config = Config(skills=[source], model=model, training=training)
    device.set_memory_limits()
    base = load_base(model.base, model.dtype)
    skill = stream.prepare_skill(source, config.data, base.tokenizer, config.seed)
    size = (config.data.max_seq_length, training.batch_size, not numerics.on_cpu())
    (validation,) = make_domains({"validation": skill.validation}, *size).values()
    return Plan(base, config, skill, validation, options.steps, options.scale)


def loss_of(plan: Plan, rank: int, seed: int, steps: int) -> float:
    """Train an expert of this rank, and return its validation loss in nats per token; that of the base for 0 steps."""
    compiled = not numerics.on_cpu()
    shapes = RoutedDecoder(plan.base, plan.config.model.projection_names, 0).shapes
    expert = Expert(shapes, rank, plan.scale * rank, mx.random.key(seed))
    model = solo.solo_model(plan.base, plan.config, expert)
    if steps:
        solo.train_solo(model, plan.config, plan.skill.train, None, steps, seed, compiled)
    routing = Routing(None, mx.array(1.0))
    return evaluate(model, plan.validation, routing, 1, evaluator=Evaluator(model, compiled)).loss


def sweep(plan: Plan, ranks: Sequence[int], seeds: Sequence[int]) -> np.ndarray:
    """Return the validation losses float64 [ranks, seeds]. Raises Diverged if one is not finite."""
    losses = np.zeros((len(ranks), len(seeds)))
    for i, rank in enumerate(ranks):
        for j, seed in enumerate(seeds):
            started = time.perf_counter()
            losses[i, j] = loss_of(plan, rank, seed, plan.steps)
            console.info(f"rank {rank}, seed {seed}: {losses[i, j]:.4f} ({time.perf_counter() - started:.0f} s)")
            if not math.isfinite(losses[i, j]):
                raise Diverged(f"rank {rank}, seed {seed}: the loss is not finite; try a lower --learning-rate")
    return losses


def show(law: PowerLaw, schedule: RankSchedule, losses: np.ndarray, base: float) -> None:
    """Print the measured and fitted losses, the law and the schedule.

    Args:
        law: The fitted law.
        schedule: The schedule.
        losses: Measured losses [ranks, seeds], in the order of law.ranks.
        base: Loss of the base.
    """
    table = Table(title="validation loss (nats per token)", title_justify="left")
    for heading in ("rank", "mean", "spread", "fitted", "doubling it gains"):
        table.add_column(heading, justify="right")
    for rank, row, fitted in zip(law.ranks, losses, law.losses(law.ranks), strict=True):
        std_text = f"{row.std(ddof=1):.4f}" if len(row) > 1 else "-"
        table.add_row(str(rank), f"{row.mean():.4f}", std_text, f"{fitted:.4f}", str(law.improvement(rank, 2 * rank)))
    console.render(table)
    console.info(f"the base alone: {base:.4f}")
    console.info("loss(r) = a + b r^-c: " + ", ".join(f"{name} = {value}" for name, value in schedule.law.items()))
    console.info(schedule.verdict)
    ranks = f"start at rank {schedule.start}, double to rank {schedule.max_rank} at most"
    console.info(f"schedule: {ranks} (epsilon {schedule.epsilon:g}, alpha / rank {schedule.scale:g})")


def figure(law: PowerLaw, schedule: RankSchedule, losses: np.ndarray, path: Path) -> None:
    """Write a self-contained HTML plot of points, curve and interval. Raises UserError if it cannot be written."""
    import plotly.graph_objects as go  # pyright: ignore[reportMissingImports] (an extra)

    ranks = np.geomspace(law.ranks[0], 2 * law.ranks[-1], 200)
    band, chart = law.band(ranks), go.Figure()
    if band is not None:
        outline: Any = {"x": [*ranks, *ranks[::-1]], "y": [*band[0], *band[1][::-1]], "line": {"width": 0}}
        chart.add_scatter(**outline, fill="toself", name=f"{power_law.CONFIDENCE:.0%} interval", hoverinfo="skip")
    chart.add_scatter(x=ranks, y=law.losses(ranks), mode="lines", name=f"{law.a:.3f} + {law.b:.3f} r^-{law.c:.2f}")
    points = np.repeat(law.ranks, losses.shape[1])
    chart.add_scatter(x=points, y=losses.ravel(), mode="markers", name="measured")
    for rank, name in ((schedule.start, "start"), (schedule.max_rank, "max_rank")):
        chart.add_vline(x=rank, line_dash="dot", annotation_text=name)
    chart.update_xaxes(type="log", title="rank", tickvals=list(law.ranks))
    chart.update_yaxes(title="validation loss (nats per token)")
    chart.update_layout(template="plotly_white", title={"text": schedule.verdict, "font": {"size": 12}})
    try:
        chart.write_html(path, include_plotlyjs=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def command(argv: list[str]) -> int:
    options = parse(argv)
    check(options)
    plan, ranks = prepare(options), sorted(options.ranks)
    console.info(f"BLAS: {blas.describe()}; device: {mx.default_device().type.name}")
    base = loss_of(plan, 1, 0, steps=0)
    try:
        losses = sweep(plan, ranks, options.seeds)
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    law = power_law.fit(ranks, losses)
    schedule = rank_schedule(law, options.epsilon, options.scale)
    show(law, schedule, losses, base)
    settings = {name: getattr(options, name) for name in ("skill", "base", "seeds", "steps", "limit", "learning_rate")}
    save_schedule(schedule, options.out, {**settings, "base_loss": base, "ranks": ranks, "losses": losses.tolist()})
    if options.plot is not None:
        figure(law, schedule, losses, options.plot)
    console.info(f"written: {', '.join(str(p) for p in (options.out, options.plot) if p is not None)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
