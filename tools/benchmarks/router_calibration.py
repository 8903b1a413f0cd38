"""How well the router's fitted rows hold on text that was not seen: cross-entropy, accuracy and calibration error.

    python tools/benchmarks/router_calibration.py                              the quickstart's skills on the embedded base (a minute)
    python tools/benchmarks/router_calibration.py --config run.yaml --seeds 3 --json calibration.json

Skills arrive one after the other, and the rows are fitted to what is remembered of them, as in training. No expert is
trained. The rows are evaluated on validation and test text beside logistic regression from zero, at the best of a grid of penalties
(the best on that very text, which no one could know) and at the fixed penalty of earlier versions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import mlx.core as mx
import numpy as np
from methods.bench import Bench, ordered, owners
from rich.console import Console
from rich.table import Table

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.config import Config
from dylora_mlx.config.load import config_from_files
from dylora_mlx.config.yaml_files import find_config
from dylora_mlx.data.chat_template import resolve_template
from dylora_mlx.data.stream import Skill
from dylora_mlx.errors import UserError
from dylora_mlx.growth.feature_statistics import FeatureScale, PooledStatistics
from dylora_mlx.model.base import device
from dylora_mlx.model.base.load import load_base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.routing import document_mean, logistic
from dylora_mlx.model.routing.logistic import Problem
from dylora_mlx.model.routing.router import Gate, GateRow, Router
from dylora_mlx.run.build import make_decoder
from dylora_mlx.training.skill import fit_router, router_tokens
from dylora_mlx.training.skill.base_pass import base_states, run_base_pass
from dylora_mlx.training.skill.router_tokens import SkillFeatures

PENALTIES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Penalties of logistic regression from zero; the first is the fixed one of earlier versions."""
BINS = 15
"""Bins of confidence in the calibration error (Guo et al. 2017)."""


class Quality(NamedTuple):
    """A gate on unseen text; every skill has the same weight."""

    cross_entropy: float
    """Nats per token."""
    accuracy: float
    """Share of tokens whose largest gate is their expert's."""
    calibration_error: float
    """Expected calibration error of the largest gate."""


class Unseen(NamedTuple):
    """Router features of validation and test text of one skill."""

    features: np.ndarray
    """float32 [n, D]."""
    expert: int


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python tools/benchmarks/router_calibration.py", __doc__)
    add = parser.add_argument
    add("--config", default="quickstart", help="a YAML file, or the name of a shipped config")
    add("--seeds", type=int, default=1, help="number of seeds, from 0; each has its own order of the skills")
    add("--same", nargs="*", default=[], metavar="NAME,NAME", help="skills that share one expert")
    add("--json", type=Path, help="write all results to this file")
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    return options


def unseen_features(config: Config, model: RoutedDecoder, skill: Skill) -> np.ndarray:
    """Return the router's features of all validation and test tokens of a skill, float32 [n, D]."""
    parts = []
    for split in (skill.validation, skill.test):
        for states in base_states(model, split.segments, config.data.max_seq_length, config.training.batch_size):
            segments = states.batch.segment_ids
            parts.append(document_mean.mix_document_mean_packed(states.features, segments, model.document_mean))
    return np.concatenate(parts)


def quality(gate: Gate, texts: Sequence[Unseen]) -> Quality:
    """Evaluate a gate for raw features."""
    weight, bias = (np.array(part, np.float64) for part in gate)
    losses, right, confidences, weights = [], [], [], []
    for features, expert in texts:
        logits = features.astype(np.float64) @ weight.T + bias
        log_gates = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        losses.append(-log_gates[:, expert])
        right.append(log_gates.argmax(1) == expert)
        confidences.append(np.exp(log_gates.max(1)))
        weights.append(np.full(len(features), 1 / len(features) / len(texts)))
    loss, correct, confidence, token_weight = (np.concatenate(each) for each in (losses, right, confidences, weights))
    gaps = np.bincount((confidence * BINS).astype(int).clip(0, BINS - 1), token_weight * (confidence - correct))
    return Quality(float(token_weight @ loss), float(token_weight @ correct), float(np.abs(gaps).sum()))


def plain_logistic(skills: list[SkillFeatures], experts: int, steps: int) -> list[Gate]:
    """Return rows of logistic regression from zero for raw features, for each of PENALTIES."""
    scale = FeatureScale.pooled(PooledStatistics.of([skill.statistics for skill in skills]))
    tokens = router_tokens.remembered_tokens(skills, [skill.memory for skill in skills], scale)
    zero = Gate(mx.zeros((experts, tokens.features.shape[1])), mx.zeros((experts,)))
    problem = Problem.of_all(*(mx.array(each) for each in (tokens.features, tokens.experts, tokens.weights)))
    return [scale.for_raw(gate) for gate in logistic.fit_rows(problem, zero, PENALTIES, steps)]


def course(bench: Bench) -> list[dict[str, object]]:
    """Let the skills of a bench arrive, and return one row of results after each."""
    model, rows, remembered, texts = make_decoder(bench.config, bench.base), [], [], []
    training = bench.config.training
    for index, skill in enumerate((bench.known, *bench.skills)):
        expert = 1 + bench.owners[skill.name] if index else 0
        base_pass = run_base_pass(model, skill, bench.config)
        remembered.append(SkillFeatures(base_pass.statistics, base_pass.memory, expert))
        texts.append(Unseen(unseen_features(bench.config, model, skill), expert))
        if not index:
            continue
        experts, router = 1 + max(text.expert for text in texts), Router(texts[0].features.shape[1])
        router.rows += [GateRow(texts[0].features.shape[1]) for _ in range(experts - 1)]
        fitted = fit_router.fit(router, remembered, training.router_fit_steps, training.memory_tokens)
        plain = [quality(gate, texts) for gate in plain_logistic(remembered, experts, 100)]
        ours, best = quality(router.gate(), texts), min(plain, key=lambda each: each.cross_entropy)
        rows.append(
            {"seed": bench.seed, "skill": skill.name, "skills": index + 1, "experts": experts, "fit": fitted._asdict(),
             "ours": ours._asdict(), "best penalty": best._asdict(), "fixed penalty": plain[0]._asdict()}
        )  # fmt: skip
    return rows


def table(rows: list[dict]) -> Table:
    table = Table(
        "seed", "after", "experts", "said when fitted", "cross-entropy", "best penalty", "fixed penalty", "right, %",
        "calibration error", "of fixed penalty", title="router on unseen text",
    )  # fmt: skip
    for row in rows:
        ours, fixed = row["ours"], row["fixed penalty"]
        table.add_row(
            str(row["seed"]), row["skill"], str(row["experts"]), f"{row['fit']['cross_entropy']:.3f}",
            f"{ours['cross_entropy']:.3f}", f"{row['best penalty']['cross_entropy']:.3f}",
            f"{fixed['cross_entropy']:.3f}", f"{100 * ours['accuracy']:.1f}", f"{ours['calibration_error']:.3f}",
            f"{fixed['calibration_error']:.3f}",
        )  # fmt: skip
    return table


def command(argv: list[str]) -> int:
    options = parse(argv)
    config = config_from_files([find_config(options.config)], {})
    if config.growth.base_skill is None:
        raise UserError("growth.base_skill is null; set it: the null expert's row is fitted to its text")
    device.set_memory_limits()
    base = load_base(config.model.base, config.model.dtype, resolve_template(config.data.chat_template))
    rows = []
    for seed in range(options.seeds):
        stream = ordered(config, seed)
        rows += course(Bench.of(base, stream, owners(stream, options.same), seed))
    Console(width=170).print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"base": base.fingerprint, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
