"""The loss matrix when not every domain is evaluated after every skill: estimates, carried losses, and the picture of a large one."""

from __future__ import annotations

import base64
import itertools
import json
import math
import re
import struct
import zlib

import numpy as np
import pytest

from dylora_mlx.reporting import loss_matrix, png
from dylora_mlx.reporting.continual import continual_metrics, estimate_forgetting, latest_losses, student_quantile
from dylora_mlx.reporting.history import LossMatrix
from dylora_mlx.reporting.page import run_page
from tests.reporting.synthetic import build, sound

BASE = {"py": 4.0, "a": 5.0, "b": 5.0, "c": 5.0, "d": 5.0}
ROWS = [BASE, {"py": 4.0, "a": 2.0, "b": 4.8}, {"py": 4.1, "b": 3.0, "c": 4.9}, {"py": 4.2, "a": 2.3, "c": 2.5}]
"""After a, b and c: b was not evaluated after c, and a not after b."""


def test_what_was_not_evaluated_keeps_its_latest_loss():
    assert latest_losses(ROWS) == {"py": 4.2, "a": 2.3, "b": 3.0, "c": 2.5, "d": 5.0}
    metrics = continual_metrics(ROWS, ["a", "b", "c"])
    assert metrics.final_mean == pytest.approx((2.3 + 3.0 + 2.5) / 3)
    assert metrics.bwt == pytest.approx((0.3 + 0.0) / 2)
    assert metrics.forgetting == pytest.approx((0.3 + 3.0 - 3.0) / 2)


def test_a_metric_needs_no_loss_of_another_one():
    """No skill was evaluated when it arrived, as in the metrics of a run that still learns."""
    rows = [BASE, {"py": 4.0, "a": 2.0}, {"py": 4.1, "b": 3.0}, {"py": 4.2, "a": 2.3, "c": 2.5}]
    metrics = continual_metrics(rows, ["a", "b", "c"])
    assert metrics.bwt == pytest.approx(0.3 / 2)
    assert metrics.forgetting == pytest.approx(0.3 / 2)
    assert metrics.fwt is None


def test_the_estimate_is_exact_where_everything_was_evaluated():
    rows = [*ROWS[:3], {"py": 4.2, "a": 2.3, "b": 3.1, "c": 2.5}]
    estimate = estimate_forgetting(rows, ["a", "b", "c"], [])
    assert estimate == pytest.approx((0.2, 0.2, 0.2))
    assert estimate_forgetting(rows, ["a", "b", "c"], ["a", "b"]) == pytest.approx((0.2, 0.2, 0.2))
    assert estimate_forgetting(ROWS[:2], ["a"], []) == (0.0, 0.0, 0.0)


def test_the_sample_stands_for_what_was_not_evaluated():
    """Of 40 skills that had all forgotten 0.1, ten were drawn, and have forgotten 0.02 more."""
    names = [f"s{i}" for i in range(41)]
    learned = [{name: 2.0} for name in names]
    before, now = dict.fromkeys(names[:40], 2.1), dict.fromkeys(names[:10], 2.12)
    rows = [dict.fromkeys(names, 3.0), *learned[:40], before, {**now, names[40]: 2.0}]
    estimate = estimate_forgetting(rows, names, names[:10])
    assert estimate.mean == pytest.approx(0.12)
    assert estimate.low < 0.12 < estimate.high
    # Without the sample the same rows are certain, and say nothing of the others.
    assert estimate_forgetting(rows, names, []).mean == pytest.approx(0.105)


def test_what_a_skill_gained_when_it_was_learned_is_no_forgetting():
    """Each skill fell from 3 to 2 and stayed there; of most the first evaluation since then is this one, or still to come."""
    names = [f"s{i}" for i in range(21)]
    learned = [{name: 2.0, following: 2.9} for name, following in itertools.pairwise(names)]
    now = {**dict.fromkeys([*names[3:7], *names[15:20]], 2.0), names[20]: 2.0}
    estimate = estimate_forgetting([dict.fromkeys(names, 3.0), *learned, now], names, names[3:7])
    assert estimate == (0.0, 0.0, 0.0)
    worse = {**now, **dict.fromkeys(names[3:7], 2.1)}
    estimate = estimate_forgetting([dict.fromkeys(names, 3.0), *learned, worse], names, names[3:7])
    assert estimate.mean == pytest.approx(0.1 * 15 / 20)
    assert estimate.low < estimate.mean < estimate.high < 0.25


@pytest.mark.parametrize("kind", ["normal", "exponential", "rare"])
def test_the_interval_covers_the_truth(kind):
    """200 streams of 100 skills, of which 16 are certain and 16 drawn: at least 95% covered, 85% if few skills change."""
    rng, names, covered = np.random.default_rng(0), [f"s{i}" for i in range(100)], 0
    draw = {
        "normal": lambda n: rng.normal(0.002, 0.004, n),
        "exponential": lambda n: rng.exponential(0.004, n),
        "rare": lambda n: (rng.random(n) < 0.1) * rng.exponential(0.03, n),
    }[kind]
    for _ in range(200):
        first = 2.0 + draw(100)
        second = first + draw(100)
        order = rng.permutation(99)
        certain, sample = order[:16], order[16:32]
        rows = [dict.fromkeys(names, 3.0), dict.fromkeys(names, 2.0), dict(zip(names, first.tolist(), strict=True))]
        rows.append({names[i]: float(second[i]) for i in [*certain, *sample, 99]})
        estimate = estimate_forgetting(rows, names, [names[i] for i in sample])
        truth = np.mean(second[:99] - np.minimum(2.0, first[:99]))
        covered += estimate.low <= truth <= estimate.high
    assert covered / 200 >= (0.85 if kind == "rare" else 0.95)


@pytest.mark.parametrize(("freedom", "quantile"), [(3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)])
def test_students_quantile(freedom, quantile):
    assert student_quantile(freedom) == pytest.approx(quantile, rel=2e-3)


def test_carried_losses_have_an_age():
    rows = loss_matrix.carried(LossMatrix(["base", "a", "b", "c"], ROWS, [*BASE]))
    assert rows[0]["d"] == (5.0, 0.0, 0)
    assert "d" in rows[3]  # not in the stream so far: a domain outside it, or one to come
    assert rows[2]["a"] == (2.0, -3.0, 1)
    assert rows[3]["b"] == (3.0, -2.0, 1)
    assert rows[3]["a"] == pytest.approx((2.3, -2.7, 0))


def pixels(uri: str) -> np.ndarray:
    """Return the pixels of a PNG, uint8 [rows, columns, 3], after a check of its checksums."""
    data, position, content = base64.b64decode(uri.partition(",")[2]), 8, b""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    shape = (0, 0)
    while position < len(data):
        size, kind = struct.unpack(">I4s", data[position : position + 8])
        chunk = data[position + 8 : position + 8 + size]
        assert struct.unpack(">I", data[position + 8 + size : position + 12 + size])[0] == zlib.crc32(kind + chunk)
        if kind == b"IHDR":
            shape = struct.unpack(">II", chunk[:8])[::-1]
        content += chunk if kind == b"IDAT" else b""
        position += 12 + size
    rows = np.frombuffer(zlib.decompress(content), np.uint8).reshape(shape[0], 1 + 3 * shape[1])
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(*shape, 3)


def test_a_picture_has_a_pixel_for_each_cell():
    colors = [[(0, 0, 0), (1, 2, 3), (255, 255, 255)], [(9, 8, 7), (6, 5, 4), (3, 2, 1)]]
    assert np.array_equal(pixels(png.data_uri(colors)), np.array(colors))


def test_a_large_matrix_is_a_picture_with_the_worst_by_name(tmp_path):
    names = [f"skill_{i}" for i in range(70)]
    page = run_page(build(tmp_path / "run", names, steps=2), ["matrix"])
    sound_page = re.search(r'src="(data:image/png[^"]+)"', page)
    assert sound_page is not None
    drawn = pixels(sound_page.group(1))
    assert drawn.shape == (71, 71, 3)
    # Every skill went from above 4 to 3 when it was learned: below the diagonal all is blue, above it white.
    assert tuple(drawn[0, 5]) == tuple(drawn[3, 60]) == (255, 255, 255)
    assert drawn[70, 30, 2] > drawn[70, 30, 0]
    assert page.count('<th scope="row"') == loss_matrix.WORST
    assert len(page) < 60_000


def test_a_small_sparse_matrix_is_a_table_with_slanted_losses(tmp_path):
    folder = build(tmp_path / "run", ["a", "b", "c"], steps=2)
    results = json.loads((folder / "results.json").read_text())
    del results["matrix"][3]["a"]
    (folder / "results.json").write_text(json.dumps(results))
    page = run_page(folder, ["matrix"])
    assert "evaluated 1 skill before" in page
    assert "slanted: not evaluated then" in sound(page).text
    assert page.count("<i>3.000</i>") == 1


def test_no_estimate_is_without_an_end():
    estimate = estimate_forgetting(ROWS, ["a", "b", "c"], [])
    assert math.isfinite(estimate.mean)
