"""Features on disk: what was written is read, and what cannot be kept is said."""

from __future__ import annotations

import numpy as np
import pytest

from dylora_mlx.data import stream
from dylora_mlx.data.packing import Segment
from dylora_mlx.training.checkpoint.feature_cache import FeatureCache, FeatureWriter, to_float16
from tests.tiny import pieces_of

LENGTHS, DIMS, ROW = (9, 20, 4, 24, 13, 6), 8, 24


@pytest.fixture
def pieces() -> list[Segment]:
    return pieces_of(LENGTHS)


def values(pieces: list[Segment]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(0, 50, (piece.positions, DIMS)).astype(np.float32) for piece in pieces]


def written(writer: FeatureWriter, pieces: list[Segment], found: list[np.ndarray]) -> FeatureCache | None:
    for batch in stream.evaluation_batches(pieces, ROW, 2):
        writer.add(batch, np.concatenate([found[i] for row in batch.rows for i in row]))
    return writer.finish()


def test_what_was_written_is_read(pieces, tmp_path):
    path, found = tmp_path / "features" / "some.npy", values(pieces)
    kept = written(FeatureWriter(path, pieces, DIMS), pieces, found)
    assert kept is not None
    assert len(kept) == len(pieces)
    for index, rows in enumerate(found):
        assert kept[index].dtype == np.float16
        assert np.array_equal(kept[index], rows.astype(np.float16))
    batch = stream.evaluation_batches(pieces, ROW, 3)[0]
    laid = stream.gather_rows(kept, batch)
    assert laid.dtype == np.float16
    assert np.array_equal(laid, stream.gather_rows([to_float16(f) for f in found], batch))
    assert np.load(path).shape == (sum(LENGTHS), DIMS)
    assert path.stat().st_size < 2 * sum(LENGTHS) * DIMS + 256
    kept.delete()
    assert not path.exists()


@pytest.mark.parametrize("value", [7e4, -7e4, np.inf, np.nan])
def test_a_value_that_does_not_fit(pieces, tmp_path, value):
    found = values(pieces)
    found[3][2, 1] = value
    writer = FeatureWriter(tmp_path / "some.npy", pieces, DIMS)
    assert written(writer, pieces, found) is None
    assert writer.failure == "a value does not fit float16"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(pieces, tmp_path):
    (tmp_path / "features").write_text("in the way")
    with pytest.raises(FileExistsError):
        FeatureWriter(tmp_path / "features" / "some.npy", pieces, DIMS)


def test_a_full_disk(pieces, tmp_path, monkeypatch):
    writer = FeatureWriter(tmp_path / "some.npy", pieces, DIMS)

    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

        def close(self):
            raise OSError(28, "No space left on device")

    assert writer._file is not None
    writer._file.close()
    monkeypatch.setattr(writer, "_file", Full())
    with pytest.raises(OSError, match="No space left on device"):
        written(writer, pieces, values(pieces))
    assert not (tmp_path / "some.npy").exists()
