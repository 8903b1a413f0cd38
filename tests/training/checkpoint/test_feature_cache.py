"""The feature cache on disk: a round trip in float16, and the failures that leave no file."""

from __future__ import annotations

import numpy as np
import pytest

from dylora_mlx.data import stream
from dylora_mlx.data.packing import Segment
from dylora_mlx.training.checkpoint.feature_cache import FeatureCache, FeatureWriter, to_float16
from tests.tiny import pieces_of

LENGTHS, DIMS, ROW = (9, 20, 4, 24, 13, 6), 8, 24


@pytest.fixture
def segments() -> list[Segment]:
    return pieces_of(LENGTHS)


def random_features(segments: list[Segment]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(0, 50, (segment.positions, DIMS)).astype(np.float32) for segment in segments]


def write_all(writer: FeatureWriter, segments: list[Segment], features: list[np.ndarray]) -> FeatureCache | None:
    for batch in stream.evaluation_batches(segments, ROW, 2):
        writer.add(batch, np.concatenate([features[i] for row in batch.rows for i in row]))
    return writer.finish()


def test_round_trip_in_float16(segments, tmp_path):
    path, features = tmp_path / "features" / "some.npy", random_features(segments)
    cache = write_all(FeatureWriter(path, segments, DIMS), segments, features)
    assert cache is not None
    assert len(cache) == len(segments)
    for index, rows in enumerate(features):
        assert cache[index].dtype == np.float16
        assert np.array_equal(cache[index], rows.astype(np.float16))
    batch = stream.evaluation_batches(segments, ROW, 3)[0]
    gathered = stream.gather_rows(cache, batch)
    assert gathered.dtype == np.float16
    assert np.array_equal(gathered, stream.gather_rows([to_float16(f) for f in features], batch))
    assert np.load(path).shape == (sum(LENGTHS), DIMS)
    assert path.stat().st_size < 2 * sum(LENGTHS) * DIMS + 256
    cache.delete()
    assert not path.exists()


@pytest.mark.parametrize("value", [7e4, -7e4, np.inf, np.nan])
def test_a_value_beyond_float16_drops_the_cache(segments, tmp_path, value):
    features = random_features(segments)
    features[3][2, 1] = value
    writer = FeatureWriter(tmp_path / "some.npy", segments, DIMS)
    assert write_all(writer, segments, features) is None
    assert writer.failure == "a value does not fit float16"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_created(segments, tmp_path):
    (tmp_path / "features").write_text("in the way")
    with pytest.raises(FileExistsError):
        FeatureWriter(tmp_path / "features" / "some.npy", segments, DIMS)


def test_a_full_disk(segments, tmp_path, monkeypatch):
    writer = FeatureWriter(tmp_path / "some.npy", segments, DIMS)

    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

        def close(self):
            raise OSError(28, "No space left on device")

    assert writer._file is not None
    writer._file.close()
    monkeypatch.setattr(writer, "_file", Full())
    with pytest.raises(OSError, match="No space left on device"):
        write_all(writer, segments, random_features(segments))
    assert not (tmp_path / "some.npy").exists()
