"""Document means, the reference, sampling in batches, and embeddings of unit length."""

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


def test_document_means_weigh_positions():
    means = embedding.DocumentMeans(np.array([7, 0, 1]), DIMS)
    for document, n, value in ((0, 3, 1.0), (1, 2, 5.0), (5, 2, 8.0), (0, 1, 9.0), (7, 4, 2.0)):
        means.add(document, np.full((n, DIMS), value, np.float32))
    assert means.means().dtype == np.float64
    assert np.allclose(means.means()[:, 0], [2, (3 * 1 + 9) / 4, 5]), "in the order asked for, others left out"


def test_embeddings_have_unit_length_and_no_base():
    means = REFERENCE.mean + RNG.normal(size=(5, DIMS))
    found = PLAIN(means)
    assert np.allclose(np.linalg.norm(found, axis=-1), 1)
    assert np.allclose(found[2], PLAIN(means[2]))
    assert np.allclose(PLAIN(REFERENCE.mean), 0)


def test_raw_means_all_look_alike_but_embeddings_do_not():
    a, b = REFERENCE.mean + np.eye(DIMS)[0], REFERENCE.mean + np.eye(DIMS)[1]
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.99
    assert abs(PLAIN(a) @ PLAIN(b)) < 1e-12


def test_whitening_evens_the_directions():
    assert np.array_equal(REFERENCE.whitener(0), np.eye(DIMS))
    almost = REFERENCE.whitener(1e-9)
    assert np.allclose(almost @ STRETCH @ almost, np.eye(DIMS), atol=1e-3)
    strong = REFERENCE.whitener(1e6)
    assert np.allclose(strong / strong[0, 0], np.eye(DIMS), atol=1e-4)
    turn = np.linalg.qr(RNG.normal(size=(DIMS, DIMS)))[0]
    turned = Reference(turn @ REFERENCE.mean, turn @ STRETCH @ turn.T).whitener(0.1)
    assert np.allclose(turned, turn @ REFERENCE.whitener(0.1) @ turn.T)


def test_whitening_survives_a_flat_direction():
    flat = Reference(np.zeros(3), np.diag([1.0, 1.0, -1e-12]))
    assert np.isfinite(flat.whitener(0.1)).all()


@pytest.mark.parametrize(
    ("documents", "samples", "batch", "kept"),
    [(40, 32, 16, 32), (40, 100, 16, 40), (39, 100, 16, 32), (5, 100, 16, 5), (33, 33, 16, 32), (100, 1, 16, 1)],
)
def test_sampling_leaves_out_a_small_last_batch(documents, samples, batch, kept):
    means = np.arange(documents, dtype=float)[:, None]
    found = embedding.sample_documents(means, samples, batch, np.random.default_rng(3))
    assert len(found) == kept
    assert len(np.unique(found)) == kept, "drawn without replacement"
    assert np.array_equal(found, embedding.sample_documents(means, samples, batch, np.random.default_rng(3)))
    if documents > 2:
        assert not np.array_equal(found, embedding.sample_documents(means, samples, batch, np.random.default_rng(4)))


def test_resampled_means_scatter_like_the_standard_error():
    means = RNG.normal(size=(50, DIMS)) + 7
    draws = embedding.bootstrap_means(means, 4000, np.random.default_rng(0))
    assert draws.shape == (4000, DIMS)
    assert np.allclose(draws.mean(0), means.mean(0), atol=0.02)
    assert np.allclose(draws.std(0), means.std(0) / 50**0.5, rtol=0.1)


def test_reference_round_trip(tmp_path):
    states = [RNG.normal(size=(n, DIMS)).astype(np.float32) @ np.diag(np.arange(1.0, 7)) for n in (200, 300)]
    made = embedding.compute_reference(states)
    joined = np.concatenate(states)
    assert np.allclose(made.mean, joined.mean(0))
    assert np.allclose(made.covariance, np.cov(joined.T))
    path = tmp_path / "new" / "reference.safetensors"
    embedding.save_reference(made, path)
    read = embedding.load_reference(path, DIMS)
    assert read.mean.dtype == np.float64
    assert np.allclose(read.mean, made.mean, rtol=1e-6)
    assert np.allclose(read.covariance, made.covariance, rtol=1e-6)


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


def test_the_embedded_base_ships_its_reference(base):
    found = embedding.load_reference(base.folder / "reference.safetensors", base.args.hidden_size)
    assert np.allclose(found.covariance, found.covariance.T, rtol=1e-5)
    assert np.linalg.eigvalsh(found.covariance).min() > -1e-4 * np.trace(found.covariance)
