"""Continual-learning metrics and FLOPs against values computed by hand, and metrics files that survive torn lines."""

from __future__ import annotations

import json

import pytest

from dylora_mlx.config import LogConfig
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.reporting.continual import continual_metrics
from dylora_mlx.training.metrics import flops
from dylora_mlx.training.metrics.recorder import MetricsRecorder, truncate_lines
from dylora_mlx.training.metrics.trackers.trackers import Trackers
from tests.tiny import ALL, quantised_base, tiny_pool

MATRIX = [
    {"a": 5.0, "b": 6.0, "c": 7.0, "other": 2.0},
    {"a": 2.0, "b": 5.5, "c": 7.5, "other": 2.1},
    {"a": 2.5, "b": 3.0, "c": 6.0, "other": 2.2},
    {"a": 2.2, "b": 3.4, "c": 4.0, "other": 2.3},
]
"""Losses before any skill, and after a, b and c."""


def test_continual_by_hand():
    metrics = continual_metrics(MATRIX, ["a", "b", "c"])
    assert metrics.final_mean == pytest.approx((2.2 + 3.4 + 4.0) / 3)
    assert metrics.bwt == pytest.approx(((2.2 - 2.0) + (3.4 - 3.0)) / 2)
    assert metrics.forgetting == pytest.approx(((2.2 - 2.0) + (3.4 - 3.0)) / 2)
    assert metrics.fwt == pytest.approx(((5.5 - 6.0) + (6.0 - 7.0)) / 2)


def test_forgetting_counts_from_the_best_loss_not_the_diagonal():
    matrix = [{"a": 5.0, "b": 6.0}, {"a": 2.0, "b": 1.0}, {"a": 1.5, "b": 3.0}]
    metrics = continual_metrics([*matrix, {"a": 1.8, "b": 3.0, "c": 1.0}], ["a", "b", "c"][:2])
    assert metrics.bwt == pytest.approx(1.5 - 2.0)
    assert metrics.forgetting == pytest.approx(1.5 - 2.0)
    longer = [row | {"c": 9.0} for row in [*matrix, {"a": 1.8, "b": 3.0}]]
    metrics = continual_metrics(longer, ["a", "b", "c"])
    assert metrics.bwt == pytest.approx(((1.8 - 2.0) + (3.0 - 3.0)) / 2)
    assert metrics.forgetting == pytest.approx(((1.8 - 1.5) + (3.0 - 1.0)) / 2)


def test_skills_count_from_their_first_evaluation():
    matrix = [{"a": 5.0, "b": 6.0}, {"a": 2.0}, {"a": 2.5, "b": 5.0}, {"a": 2.2, "b": 3.0}]
    assert continual_metrics(matrix, ["a", "a2", "b"][:1]) == (2.0, None, None, None)
    metrics = continual_metrics([{"a": 5.0, "b": 6.0}, {"a": 2.0, "b": 5.5}, {"a": 2.5, "b": 3.0}], ["a", "b"])
    assert (metrics.bwt, metrics.forgetting, metrics.fwt) == (
        pytest.approx(0.5),
        pytest.approx(0.5),
        pytest.approx(-0.5),
    )
    gaps = [{"a": 5.0, "b": 6.0, "c": 7.0}, {"a": 2.0}, {"a": 2.5, "b": 3.0, "c": 6.0}, {"a": 2.4, "b": 3.1, "c": 4.0}]
    metrics = continual_metrics(gaps, ["a", "b", "c"])
    assert metrics.forgetting == pytest.approx(((2.4 - 2.0) + (3.1 - 3.0)) / 2)
    assert metrics.fwt == pytest.approx(6.0 - 7.0)
    assert continual_metrics([{}, {}, {"a": 1.0, "b": 2.0}], ["a", "b"]) == (1.5, None, None, None)


def test_metrics_of_part_of_the_stream():
    assert continual_metrics(MATRIX, ["a"]) == (2.0, None, None, None)
    metrics = continual_metrics(MATRIX, ["a", "b"])
    assert metrics.final_mean == pytest.approx(2.75)
    assert (metrics.bwt, metrics.fwt) == (pytest.approx(0.5), pytest.approx(-0.5))


# Counts. The tiny base: hidden 64, mlp 96, 4 query and 2 key-value heads of 24, 4 layers, vocabulary 90.

PROJECTIONS = 2 * (64 * 96 + 2 * 64 * 48 + 96 * 64 + 3 * 64 * 96)
SCORES = 4 * 24 * 4
"""Per query and key: the score and the weighted value, each a multiply-add over the head size, for four heads."""
HEAD = 2 * 2 * 64 * 90
QV = 2 * 3 * ((64 + 96) + (64 + 48))
"""Per rank and layer: forward, and backward to weights and activations; a multiply-add counts as two."""


@pytest.mark.parametrize(
    ("router_layer", "known", "checkpointed", "forwards", "routed"),
    [
        ("final", False, False, 8, 4),
        ("final", True, False, 4, 4),
        ("final", True, True, 8, 4),
        (2, False, False, 4, 2),
        (3, False, True, 5, 1),
    ],
)
def test_step_flops_by_hand(router_layer, known, checkpointed, forwards, routed):
    model = tiny_pool([2, 3], router_layer, grad_checkpoint=checkpointed).model
    rows, length, targets = 3, 40, 50
    each = forwards * (PROJECTIONS + SCORES * length) + routed * (PROJECTIONS + 2 * SCORES * length) + 5 * routed * QV
    assert flops.step_flops(model, rows, length, targets, known) == rows * length * each + targets * HEAD


def test_parameters_are_counted():
    pool = tiny_pool([2, 3], projections=ALL)
    layer = 64 * 96 + 2 * 64 * 48 + 96 * 64 + 3 * 64 * 96 + 4 * 64 + 2 * 24
    assert flops.base_parameters(pool.model) == 4 * layer + 64 + 2 * 90 * 64
    assert flops.trainable_parameters(pool.model) == pool.num_parameters() + 3 * 65
    quantised = RoutedDecoder(quantised_base(), list(ALL), "final")
    assert flops.base_parameters(quantised) == flops.base_parameters(pool.model), "not the packed words"
    pool.freeze(1)
    assert flops.trainable_parameters(pool.model) == pool.num_parameters() * 3 // 5 + 3 * 65


# Records.


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_are_json_lines(tmp_path):
    recorder = MetricsRecorder(tmp_path, Trackers(LogConfig(), tmp_path, {}, "id", pytest.fail))
    recorder.log(1, {"lm_loss": 2.5})
    recorder.log(2, {"lm_loss": 2.25})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "lm_loss": 2.5}, {"step": 2, "lm_loss": 2.25}]
    assert recorder.lines == 2


def test_truncate_repairs_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 2, "lm_l')
    truncate_lines(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_without_a_file(tmp_path):
    truncate_lines(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.iterdir())
