"""The reference statistics of a base: of one text, whatever the packed rows, computed once and then read from the cache."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx import assets
from dylora_mlx.model.decoder import attention
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.training.skill import base_pass


@pytest.fixture
def model(base):
    return RoutedDecoder(base, ["q_proj"], "final")


def test_means_are_those_of_each_text_alone(base, model):
    texts = [assets.reference_text()[number] for number in (0, 40, 90, 143)]
    means = base_pass.text_means(texts, base, model, length=256, rows=2)
    for text, mean in zip(texts, means, strict=True):
        # The last token is only predicted.
        ids = mx.array([[base.tokenizer.bos_token_id, *base.tokenizer.encode(text, add_special_tokens=False)]])
        layout = attention.attention_layout(np.ones(ids.shape, np.int32), model.window)
        states = np.array(model.base_states(ids, layout))[0]
        assert mean == pytest.approx(states.mean(0, dtype=np.float64), abs=2e-4)


def test_statistics_are_computed_once_and_are_those_of_the_text(base, model, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    texts = assets.reference_text()[::12]
    monkeypatch.setattr(assets, "reference_text", lambda: texts)
    reference = base_pass.load_reference_statistics(base, model)
    means = base_pass.text_means(texts, base, model, base_pass.REFERENCE_LENGTH, base_pass.REFERENCE_ROWS)
    assert reference.mean == pytest.approx(means.mean(0))
    assert reference.covariance == pytest.approx(np.cov(means.T))
    monkeypatch.setattr(base_pass, "text_means", None)  # a second computation would fail
    again = base_pass.load_reference_statistics(base, model)
    assert np.array_equal(again.mean, reference.mean)
    assert np.array_equal(again.covariance, reference.covariance)
    monkeypatch.setattr(assets, "reference_text", lambda: texts[:5])
    with pytest.raises(TypeError):
        base_pass.load_reference_statistics(base, model)  # of another text, so it is not the cached one
