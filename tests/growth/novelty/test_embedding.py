"""Document means, the reference statistics, sampling in batches, whitening, and unit-length embeddings."""

from __future__ import annotations

import numpy as np
import pytest

from dylora_mlx.errors import UserError
from dylora_mlx.growth.novelty import embedding
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace, Reference

DIMS = 6
RNG = np.random.default_rng(0)
STRETCH = np.diag([9.0, 4, 1, 1, 0.25, 0.01])
REFERENCE = Reference(np.arange(DIMS) * 10.0, STRETCH)
PLAIN = EmbeddingSpace(REFERENCE, 0.0)


def test_document_means_average_over_tokens():
    means = embedding.DocumentMeans(np.array([7, 0, 1]), DIMS)
    for document, n, value in ((0, 3, 1.0), (1, 2, 5.0), (5, 2, 8.0), (0, 1, 9.0), (7, 4, 2.0)):
        means.add(document, np.full((n, DIMS), value, np.float32))
    assert means.means().dtype == np.float64
    assert np.allclose(means.means()[:, 0], [2, (3 * 1 + 9) / 4, 5]), "in the order of the ids, without the others"


def test_embeddings_are_centred_and_have_unit_length():
    means = REFERENCE.mean + RNG.normal(size=(5, DIMS))
    embeddings = PLAIN(means)
    assert np.allclose(np.linalg.norm(embeddings, axis=-1), 1)
    assert np.allclose(embeddings[2], PLAIN(means[2]))
    assert np.allclose(PLAIN(REFERENCE.mean), 0)


def test_embeddings_separate_means_whose_raw_cosine_is_high():
    a, b = REFERENCE.mean + np.eye(DIMS)[0], REFERENCE.mean + np.eye(DIMS)[1]
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.99
    assert abs(PLAIN(a) @ PLAIN(b)) < 1e-12


def test_whitening_equalises_the_variances():
    assert np.array_equal(REFERENCE.whitener(0), np.eye(DIMS))
    nearly_full = REFERENCE.whitener(1e-9)
    assert np.allclose(nearly_full @ STRETCH @ nearly_full, np.eye(DIMS), atol=1e-3)
    strongly_regularised = REFERENCE.whitener(1e6)
    assert np.allclose(strongly_regularised / strongly_regularised[0, 0], np.eye(DIMS), atol=1e-4)
    rotation = np.linalg.qr(RNG.normal(size=(DIMS, DIMS)))[0]
    rotated = Reference(rotation @ REFERENCE.mean, rotation @ STRETCH @ rotation.T).whitener(0.1)
    assert np.allclose(rotated, rotation @ REFERENCE.whitener(0.1) @ rotation.T)


def test_whitening_survives_a_flat_direction():
    flat = Reference(np.zeros(3), np.diag([1.0, 1.0, -1e-12]))
    assert np.isfinite(flat.whitener(0.1)).all()


@pytest.mark.parametrize(
    ("documents", "samples", "batch", "kept"),
    [(40, 32, 16, 32), (40, 100, 16, 40), (39, 100, 16, 32), (5, 100, 16, 5), (33, 33, 16, 32), (100, 1, 16, 1)],
)
def test_sampling_leaves_out_a_small_last_batch(documents, samples, batch, kept):
    means = np.arange(documents, dtype=float)[:, None]
    sample = embedding.sample_documents(means, samples, batch, np.random.default_rng(3))
    assert len(sample) == kept
    assert len(np.unique(sample)) == kept, "drawn without replacement"
    assert np.array_equal(sample, embedding.sample_documents(means, samples, batch, np.random.default_rng(3)))
    if documents > 2:
        assert not np.array_equal(sample, embedding.sample_documents(means, samples, batch, np.random.default_rng(4)))


def test_bootstrap_means_have_the_standard_error():
    means = RNG.normal(size=(50, DIMS)) + 7
    draws = embedding.bootstrap_means(means, 4000, np.random.default_rng(0))
    assert draws.shape == (4000, DIMS)
    assert np.allclose(draws.mean(0), means.mean(0), atol=0.02)
    assert np.allclose(draws.std(0), means.std(0) / 50**0.5, rtol=0.1)


def test_reference_round_trip(tmp_path):
    means = RNG.normal(size=(500, DIMS)).astype(np.float32) @ np.diag(np.arange(1.0, 7))
    reference = embedding.compute_reference(means)
    assert np.allclose(reference.mean, means.mean(0))
    assert np.allclose(reference.covariance, np.cov(means.T))
    path = tmp_path / "new" / "reference.safetensors"
    embedding.save_reference(reference, path)
    loaded = embedding.load_reference(path, DIMS)
    assert loaded.mean.dtype == np.float64
    assert np.array_equal(loaded.mean, reference.mean), "computed or read, the statistics have the same bits"
    assert np.array_equal(loaded.covariance, reference.covariance)


def test_a_reference_that_does_not_fit(tmp_path):
    path = tmp_path / "reference.safetensors"
    with pytest.raises(UserError, match="not readable"):
        embedding.load_reference(path, DIMS)
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not readable"):
        embedding.load_reference(path, DIMS)
    embedding.save_reference(REFERENCE, path)
    with pytest.raises(UserError, match=r"hidden size 6, not 8"):
        embedding.load_reference(path, 8)
