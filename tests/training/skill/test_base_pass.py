"""The base pass over a skill: one forward pass per segment, and the means, statistics and cached features it yields."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.config import Config, DataConfig, GrowthConfig, Source, TrainingConfig
from dylora_mlx.data import stream
from dylora_mlx.data.packing import Segment
from dylora_mlx.data.stream import Skill, Split
from dylora_mlx.errors import UserError
from dylora_mlx.growth.feature_statistics import FeatureStatistics
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.training.skill.base_pass import base_states, rows_by_segment, run_base_pass
from dylora_mlx.training.step.losses import device_batch
from tests.tiny import ARGS, alone, close, pieces_of, tiny_pool

ROW, MEMORY = 24, 50
LENGTHS = (9, 20, 4, 24, 13, 6, 11, 23, 7, 16)
SOURCE = Source(name="some", source="some.jsonl")
CONFIG = Config(
    skills=[SOURCE],
    data=DataConfig(max_seq_length=ROW),
    growth=GrowthConfig(embedding_samples=6, batch_samples=2, min_samples=1),
    training=TrainingConfig(memory_tokens=MEMORY, batch_size=2),
)


@pytest.fixture(scope="module")
def segments() -> list[Segment]:
    """Segments in which every third document was cut in two."""
    return [segment._replace(document=number - number // 3) for number, segment in enumerate(pieces_of(LENGTHS))]


@pytest.fixture
def skill(segments) -> Skill:
    split = Split(segments, segments[-1].document + 1)
    return Skill("some", SOURCE, split, split, split, "")


def states_one_by_one(model: RoutedDecoder, segments: list[Segment]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the final states and router features of each segment, each from a separate pass."""
    states = []
    for segment in segments:
        tokens, attn_layout = mx.array(segment.tokens[None, :-1]), alone(segment.positions)
        states.append(
            (
                np.array(model.base_states(tokens, attn_layout))[0],
                np.array(model.router_features(tokens, attn_layout))[0],
            )
        )
    return states


@pytest.mark.parametrize("router_layer", ["final", 0, 2])
def test_states_of_segments(segments, router_layer):
    model = tiny_pool([2], router_layer).model
    expected, seen = states_one_by_one(model, segments), []
    for batch, final, features in base_states(model, segments, ROW, 2):
        seen += [i for row in batch.rows for i in row]
        assert final.shape == features.shape == ((batch.segment_ids > 0).sum(), ARGS.hidden_size)
        assert (final is features) == (router_layer == "final")
        for index, rows in rows_by_segment(batch, segments):
            assert close(final[rows], expected[index][0], 1e-4)
            assert close(features[rows], expected[index][1], 1e-4)
    assert sorted(seen) == list(range(len(segments)))


@pytest.mark.parametrize("router_layer", ["final", 2])
def test_every_layer_runs_once(skill, router_layer, monkeypatch):
    model, layers = tiny_pool([2], router_layer).model, []
    original = RoutedDecoder._run_blocks

    def run(self, h, attn_layout, first, last, *rest):
        layers.extend(range(first, last))
        return original(self, h, attn_layout, first, last, *rest)

    monkeypatch.setattr(RoutedDecoder, "_run_blocks", run)
    run_base_pass(model, skill, CONFIG)
    batches = len(stream.evaluation_batches(skill.train.segments, ROW, 2))
    assert sorted(layers) == sorted([*range(ARGS.num_hidden_layers)] * batches)


@pytest.mark.parametrize("router_layer", ["final", 2])
def test_base_pass_equals_statistics_of_all_states_at_once(skill, router_layer, tmp_path):
    model = tiny_pool([2], router_layer).model
    result = run_base_pass(model, skill, CONFIG, tmp_path / "some.npy")
    expected = states_one_by_one(model, skill.train.segments)
    means = [
        np.concatenate([s for (s, _), p in zip(expected, skill.train.segments, strict=True) if p.document == d]).mean(0)
        for d in range(skill.train.num_documents)
    ]
    assert result.means.shape == (6, ARGS.hidden_size)
    assert all(any(close(mean, m, 1e-4) for m in means) for mean in result.means)
    features = np.concatenate([f for _, f in expected])
    for ours, theirs in zip(result.statistics, FeatureStatistics.from_features(features), strict=True):
        assert close(ours, theirs, 1e-3)
    assert result.memory.shape == (MEMORY, ARGS.hidden_size)
    nearest = [np.abs(features - row).max(1).argmin() for row in result.memory]
    assert result.memory.dtype == np.float16
    assert np.allclose(result.memory, features[nearest], atol=1e-4, rtol=1e-3)
    assert len(set(nearest)) == MEMORY, "drawn without replacement"
    assert (result.features is not None) == (router_layer == "final") == (tmp_path / "some.npy").exists()


def test_base_pass_repeats_exactly_with_and_without_cache(skill, tmp_path):
    model = tiny_pool([2]).model
    first = run_base_pass(model, skill, CONFIG, tmp_path / "kept.npy")
    repeated = run_base_pass(model, skill, CONFIG, tmp_path / "again.npy")
    assert (tmp_path / "kept.npy").read_bytes() == (tmp_path / "again.npy").read_bytes()
    for other in (repeated, run_base_pass(model, skill, CONFIG)):
        assert np.array_equal(first.means, other.means)
        assert np.array_equal(first.memory, other.memory)
        assert np.array_equal(first.statistics.gram, other.statistics.gram)


def test_beyond_the_cache_budget_only_a_sample_is_used(skill, tmp_path):
    no_cache = replace(CONFIG, data=replace(CONFIG.data, feature_cache_mb=0))
    result = run_base_pass(tiny_pool([2]).model, skill, no_cache, tmp_path / "some.npy")
    assert result.features is None
    assert list(tmp_path.iterdir()) == []
    assert len(result.means) == 6
    assert result.statistics.num_rows < skill.train.num_tokens


def test_values_beyond_float16_are_reported_and_not_cached(skill, tmp_path, monkeypatch, capsys):
    original = RoutedDecoder.base_states
    monkeypatch.setattr(RoutedDecoder, "base_states", lambda *a: original(*a) * 1e5)
    result = run_base_pass(tiny_pool([2]).model, skill, CONFIG, tmp_path / "some.npy")
    assert result.features is None
    assert np.isfinite(result.means).all()
    assert "some: features are computed again at every step" in capsys.readouterr().err
    monkeypatch.setattr(RoutedDecoder, "base_states", lambda *a: original(*a) * mx.inf)
    with pytest.raises(UserError, match=r"not finite; use --model.dtype float32"):
        run_base_pass(tiny_pool([2]).model, skill, CONFIG)


def test_cached_features_equal_the_models(skill, tmp_path):
    model = tiny_pool([2]).model
    result = run_base_pass(model, skill, CONFIG, tmp_path / "some.npy")
    assert result.features is not None
    batch = stream.evaluation_batches(skill.train.segments, ROW, 2)[0]
    micro = device_batch(batch, model.window, stream.gather_rows(result.features, batch))
    assert micro.features is not None
    assert micro.features.dtype == mx.float16
    valid_mask = batch.segment_ids > 0
    assert close(
        np.array(micro.features)[valid_mask],
        np.array(model.router_features(micro.inputs, micro.attn_layout))[valid_mask],
        2e-3,
    )
