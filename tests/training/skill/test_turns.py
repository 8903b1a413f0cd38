"""Texts that turn from one skill to another, and the router's fit to what they show."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.config import Config, DataConfig, Source, TrainingConfig
from dylora_mlx.data.packing import Segment
from dylora_mlx.growth.feature_statistics import FeatureScale, FeatureStatistics, PooledStatistics
from dylora_mlx.model.decoder.attention import attention_layout
from dylora_mlx.model.routing.document_mean import DocumentMean, mix_document_mean
from dylora_mlx.model.routing.router import GateRow, Router, cross_entropy
from dylora_mlx.system.seeds import SeedStream, generator
from dylora_mlx.training.skill import fit_router, router_tokens, turns
from dylora_mlx.training.skill.router_tokens import SkillFeatures
from dylora_mlx.training.skill.turns import Exemplars, TurnFeatures
from tests.tiny import tiny_pool

DIMS = 4
BOS = 1


def exemplars(expert: int, documents: int = 6, tokens: int = 120) -> Exemplars:
    """Documents of BOS and then one token id, which is the expert's number and 10."""
    ids = np.full(tokens, 10 + expert, np.int32)
    ids[0] = BOS
    return Exemplars([Segment(ids, ids > 0, number, 1) for number in range(documents)], expert)


def test_every_piece_is_of_another_skill_and_within_the_row():
    texts = turns.splice([exemplars(0), exemplars(2), exemplars(3)], 96, np.random.default_rng(0))
    total = 0
    for tokens, experts in texts:
        assert len(tokens) == len(experts) <= 96
        assert BOS not in tokens[1:], "only a text's own beginning may have a BOS"
        first = int(np.argmax(experts >= 0))
        assert (experts[:first] == -1).all()
        assert (tokens[first:] == 10 + experts[first:]).all()
        changes = np.flatnonzero(np.diff(tokens[1:])) + 1
        assert len(changes) == turns.PIECES - 1
        total += len(tokens) - 1
    assert turns.TOKENS <= total < turns.TOKENS + 96
    assert {int(e) for _, experts in texts for e in experts} == {-1, 0, 2, 3}


def test_there_are_no_turns_without_two_experts():
    rng = np.random.default_rng(0)
    assert turns.splice([], 96, rng) == []
    assert turns.splice([exemplars(1), exemplars(1)], 96, rng) == []
    assert turns.splice([exemplars(1), Exemplars([], 2)], 96, rng) == []


def test_short_documents_and_rows_give_short_pieces():
    texts = turns.splice([exemplars(0, tokens=5), exemplars(1, tokens=3)], 8, np.random.default_rng(0))
    assert all(3 <= len(tokens) <= 8 for tokens, _ in texts)


def test_the_features_are_those_of_the_spliced_text():
    model = tiny_pool([2, 2]).model
    model.document_mean = DocumentMean(0.8, 0.9)
    config = Config(
        skills=[Source(name="a", source="packaged/sql")],
        data=DataConfig(max_seq_length=48), training=TrainingConfig(batch_size=2),
    )  # fmt: skip
    given = [exemplars(0), exemplars(2)]
    found = turns.turn_features(model, given, config)
    assert [each.expert for each in found] == [0, 2]
    expected: dict[int, list[np.ndarray]] = {0: [], 2: []}
    for tokens, experts in turns.splice(given, 48, generator(config.seed, SeedStream.TURNS)):
        inputs = mx.array(tokens[None, :-1])
        features = model.router_features(inputs, attention_layout(np.ones(inputs.shape, np.int32), model.window))
        mixed = np.array(mix_document_mean(features, model.document_mean)[0])
        for expert_id in expected:
            expected[expert_id].append(mixed[experts[:-1] == expert_id])
    for each in found:
        assert each.features == pytest.approx(np.concatenate(expected[each.expert]), abs=1e-4)


def test_turns_have_their_share_of_the_weight():
    rng = np.random.default_rng(0)
    skills = [
        SkillFeatures(FeatureStatistics.from_features(x), x, e)
        for e, x in enumerate(rng.normal(size=(2, 40, DIMS)).astype(np.float32))
    ]
    scale = FeatureScale.pooled(PooledStatistics.of([skill.statistics for skill in skills]))
    plain = router_tokens.remembered_tokens(skills, [skill.memory for skill in skills], scale)
    after = [TurnFeatures(rng.normal(size=(n, DIMS)).astype(np.float32), e) for e, n in ((0, 8), (1, 20))]
    both = router_tokens.with_turns(plain, after, scale)
    assert len(both.features) == 108
    assert both.weights.sum() == pytest.approx(1, abs=1e-5)
    assert both.weights[80:88].sum() == pytest.approx(router_tokens.TURN_SHARE / 2, abs=1e-6)
    assert both.weights[88:].sum() == pytest.approx(router_tokens.TURN_SHARE / 2, abs=1e-6)
    assert both.experts[80:].tolist() == [0] * 8 + [1] * 20
    ends = router_tokens.with_turns(plain, after, scale, begin=3)
    assert np.array_equal(ends.features[80:82], scale.standardised(after[0].features[6:]))
    assert router_tokens.with_turns(plain, [], scale) is plain


def test_a_router_that_has_seen_turns_is_right_after_them():
    """After a turn the features of each expert lie elsewhere: nearer to the other expert's."""
    rng = np.random.default_rng(0)

    def drawn(mean: list[float], count: int = 400) -> np.ndarray:
        return (np.array(mean) + 0.6 * rng.normal(size=(count, DIMS))).astype(np.float32)

    skills = [
        SkillFeatures(FeatureStatistics.from_features(x), x, e)
        for e, x in enumerate((drawn([2, 1, 0, 0]), drawn([-2, -1, 0, 0])))
    ]
    after = [TurnFeatures(drawn([-1, 1.5, 0, 0]), 0), TurnFeatures(drawn([1, -1.5, 0, 0]), 1)]
    losses = []
    for given in ([], after):
        router = Router(DIMS)
        router.rows.append(GateRow(DIMS))
        fit_router.fit(router, skills, 200, 4096, turns=given)
        unseen = mx.array(drawn([-1, 1.5, 0, 0]))
        losses.append(float(cross_entropy(router(unseen), mx.zeros(400, mx.int32)).mean()))
    assert losses[1] < 0.6 * losses[0]
