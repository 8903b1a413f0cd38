"""One pass over a skill: the base's states of its pieces, and everything that is made of them, part by part."""

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
from dylora_mlx.growth.gate_init import FeatureStatistics
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.training.skill.base_pass import _rows_by_segment, base_states, run_base_pass
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
def pieces() -> list[Segment]:
    """Every third document was cut in two."""
    return [piece._replace(document=number - number // 3) for number, piece in enumerate(pieces_of(LENGTHS))]


@pytest.fixture
def skill(pieces) -> Skill:
    split = Split(pieces, pieces[-1].document + 1)
    return Skill("some", SOURCE, split, split, split, "")


def directly(model: RoutedDecoder, pieces: list[Segment]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Final states and features of each piece, in passes of its own."""
    found = []
    for piece in pieces:
        tokens, where = mx.array(piece.tokens[None, :-1]), alone(piece.positions)
        found.append((np.array(model.base_states(tokens, where))[0], np.array(model.router_features(tokens, where))[0]))
    return found


@pytest.mark.parametrize("router_layer", ["final", 0, 2])
def test_states_of_pieces(pieces, router_layer):
    model = tiny_pool([2], router_layer).model
    expected, seen = directly(model, pieces), []
    for batch, final, features in base_states(model, pieces, ROW, 2):
        seen += [i for row in batch.rows for i in row]
        assert final.shape == features.shape == ((batch.segment_ids > 0).sum(), ARGS.hidden_size)
        assert (final is features) == (router_layer == "final")
        for index, rows in _rows_by_segment(batch, pieces):
            assert close(final[rows], expected[index][0], 1e-4)
            assert close(features[rows], expected[index][1], 1e-4)
    assert sorted(seen) == list(range(len(pieces)))


@pytest.mark.parametrize("router_layer", ["final", 2])
def test_every_layer_runs_once(skill, router_layer, monkeypatch):
    model, layers = tiny_pool([2], router_layer).model, []
    original = RoutedDecoder._run_blocks

    def run(self, h, where, first, last, *rest):
        layers.extend(range(first, last))
        return original(self, h, where, first, last, *rest)

    monkeypatch.setattr(RoutedDecoder, "_run_blocks", run)
    run_base_pass(model, skill, CONFIG)
    batches = len(stream.evaluation_batches(skill.train.segments, ROW, 2))
    assert sorted(layers) == sorted([*range(ARGS.num_hidden_layers)] * batches)


@pytest.mark.parametrize("router_layer", ["final", 2])
def test_a_study_is_that_of_all_states_at_once(skill, router_layer, tmp_path):
    model = tiny_pool([2], router_layer).model
    found = run_base_pass(model, skill, CONFIG, tmp_path / "some.npy")
    expected = directly(model, skill.train.segments)
    means = [
        np.concatenate([s for (s, _), p in zip(expected, skill.train.segments, strict=True) if p.document == d]).mean(0)
        for d in range(skill.train.num_documents)
    ]
    assert found.means.shape == (6, ARGS.hidden_size)
    assert all(any(close(mean, m, 1e-4) for m in means) for mean in found.means)
    features = np.concatenate([f for _, f in expected])
    for ours, theirs in zip(found.statistics, FeatureStatistics.from_features(features), strict=True):
        assert close(ours, theirs, 1e-3)
    assert found.memory.shape == (MEMORY, ARGS.hidden_size)
    nearest = [np.abs(features - row).max(1).argmin() for row in found.memory]
    assert np.allclose(found.memory, features[nearest], atol=1e-4)
    assert len(set(nearest)) == MEMORY, "drawn without replacement"
    assert (found.features is not None) == (router_layer == "final") == (tmp_path / "some.npy").exists()


def test_a_study_is_the_same_again_whatever_is_kept(skill, tmp_path):
    model = tiny_pool([2]).model
    kept = run_base_pass(model, skill, CONFIG, tmp_path / "kept.npy")
    again = run_base_pass(model, skill, CONFIG, tmp_path / "again.npy")
    assert (tmp_path / "kept.npy").read_bytes() == (tmp_path / "again.npy").read_bytes()
    for other in (again, run_base_pass(model, skill, CONFIG)):
        assert np.array_equal(kept.means, other.means)
        assert np.array_equal(kept.memory, other.memory)
        assert np.array_equal(kept.statistics.gram, other.statistics.gram)


def test_beyond_the_budget_a_sample_is_studied(skill, tmp_path):
    none = replace(CONFIG, data=replace(CONFIG.data, feature_cache_mb=0))
    found = run_base_pass(tiny_pool([2]).model, skill, none, tmp_path / "some.npy")
    assert found.features is None
    assert list(tmp_path.iterdir()) == []
    assert len(found.means) == 6
    assert found.statistics.num_rows < skill.train.num_tokens


def test_values_beyond_float16_are_said_and_not_kept(skill, tmp_path, monkeypatch, capsys):
    original = RoutedDecoder.base_states
    monkeypatch.setattr(RoutedDecoder, "base_states", lambda *a: original(*a) * 1e5)
    found = run_base_pass(tiny_pool([2]).model, skill, CONFIG, tmp_path / "some.npy")
    assert found.features is None
    assert np.isfinite(found.means).all()
    assert "some: features are computed again at every step" in capsys.readouterr().err
    monkeypatch.setattr(RoutedDecoder, "base_states", lambda *a: original(*a) * mx.inf)
    with pytest.raises(UserError, match=r"not finite; use --model.dtype float32"):
        run_base_pass(tiny_pool([2]).model, skill, CONFIG)


def test_kept_features_are_the_models_own(skill, tmp_path):
    model = tiny_pool([2]).model
    found = run_base_pass(model, skill, CONFIG, tmp_path / "some.npy")
    assert found.features is not None
    batch = stream.evaluation_batches(skill.train.segments, ROW, 2)[0]
    micro = device_batch(batch, model.window, stream.gather_rows(found.features, batch))
    assert micro.features is not None
    assert micro.features.dtype == mx.float16
    real = batch.segment_ids > 0
    assert close(
        np.array(micro.features)[real], np.array(model.router_features(micro.inputs, micro.attn_layout))[real], 2e-3
    )
