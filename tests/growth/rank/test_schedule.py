"""Rank schedules: derivation from a power law and its uncertainty, and the file they are stored in."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dylora_mlx.errors import UserError
from dylora_mlx.growth.rank.power_law import PowerLaw
from dylora_mlx.growth.rank.schedule import FORMAT, load_schedule, rank_schedule, save_schedule

RANKS = (1, 2, 4, 8, 16, 32, 64)


def law(b: float, b_draws: tuple[float, ...] = (), ranks=RANKS, misses: bool = False) -> PowerLaw:
    """Return the law 3 + b / r. Its bootstrap draws contain each of `b_draws` equally often."""
    draws = np.array([[3.0, b_draw, 1.0] for b_draw in b_draws for _ in range(50)]).reshape(-1, 3)
    return PowerLaw(3.0, b, 1.0, ranks, draws, misses)


def test_schedule_of_a_law_without_uncertainty():
    """Doubling rank r gains 0.5 / 2r.

    The gain at 32 is 0.0078, the first below epsilon 0.01. Rank 2 reaches half of the total fall from 1 to 32.
    """
    schedule = rank_schedule(law(0.5, (0.5,)), 0.01, 2.0)
    assert (schedule.start, schedule.max_rank) == (2, 32)
    assert (schedule.epsilon, schedule.scale) == (0.01, 2.0)
    assert list(schedule.gains) == list(RANKS)
    assert schedule.gains[8].value == pytest.approx(0.5 / 16)
    assert schedule.gains[8].interval == pytest.approx((0.5 / 16, 0.5 / 16))
    assert schedule.law["b"].value == 0.5
    assert "from rank 1 to 64 the loss falls by 0.4922" in schedule.verdict
    assert "sweep" not in schedule.verdict


@pytest.mark.parametrize(("epsilon", "max_rank"), [(0.3, 1), (0.2, 2), (0.02, 16), (0.005, 64), (0.001, 64)])
def test_epsilon_decides_the_largest_rank(epsilon, max_rank):
    schedule = rank_schedule(law(0.5, (0.5,)), epsilon, 2.0)
    assert schedule.max_rank == max_rank
    assert schedule.start <= max_rank
    assert ("sweep higher ranks" in schedule.verdict) == (epsilon == 0.001)


def test_uncertainty_raises_the_largest_rank():
    """b is 0.5, but may be 1. The interval's upper end decides, and it doubles the gain."""
    assert rank_schedule(law(0.5, (0.25, 0.5, 1.0)), 0.01, 2.0).max_rank == 64
    assert rank_schedule(law(0.5, (0.25, 0.5)), 0.01, 2.0).max_rank == 32


def test_schedule_of_a_law_without_intervals():
    schedule = rank_schedule(law(0.5, ranks=(1, 4, 16)), 0.1, 2.0)
    assert (schedule.start, schedule.max_rank) == (2, 16)
    assert list(schedule.gains) == [1, 2, 4, 8, 16]
    assert "three ranks and one seed" in schedule.verdict


def test_a_flat_law():
    schedule = rank_schedule(law(0.0, (0.0, 0.0, 0.001)), 0.01, 2.0)
    assert (schedule.start, schedule.max_rank) == (1, 1)
    assert schedule.verdict.startswith("flat: from rank 1 to 64")
    assert "cannot tell a rank" in schedule.verdict


def test_the_verdict_names_a_lack_of_fit():
    assert "misses the losses" in rank_schedule(law(0.5, (0.5,), misses=True), 0.01, 2.0).verdict
    assert "misses" not in rank_schedule(law(0.5, (0.5,)), 0.01, 2.0).verdict


def test_doublings_start_from_the_smallest_rank_and_stay_in_the_sweep():
    schedule = rank_schedule(law(0.5, (0.5,), ranks=(3, 10, 30)), 0.001, 2.0)
    assert list(schedule.gains) == [3, 6, 12, 24]
    assert schedule.max_rank == 24


@pytest.mark.parametrize("fitted_law", [law(0.5, (0.4, 0.6)), law(0.5, ranks=(1, 2, 4))], ids=["intervals", "none"])
def test_round_trip(tmp_path, fitted_law):
    schedule, path = rank_schedule(fitted_law, 0.01, 1.5), tmp_path / "ranks.json"
    path.write_text("older")
    save_schedule(schedule, path, {"skill": "sql", "losses": [[3.0, 3.1]]})
    assert load_schedule(path) == schedule
    content = json.loads(path.read_text())
    assert content["format"] == FORMAT
    assert content["measured"] == {"skill": "sql", "losses": [[3.0, 3.1]]}
    assert [p.name for p in tmp_path.iterdir()] == ["ranks.json"]


@pytest.fixture
def content(tmp_path) -> dict:
    save_schedule(rank_schedule(law(0.5, (0.4, 0.6)), 0.01, 2.0), tmp_path / "good.json", {})
    return json.loads((tmp_path / "good.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 1 .it says 2"),
        ({"format": None}, "format 1 .it says None"),
        ({"start": 0}, "no doublings"),
        ({"start": -2}, "no doublings"),
        ({"start": "2"}, "'2' is no rank"),
        ({"start": 2.0}, "2.0 is no rank"),
        ({"start": True}, "True is no rank"),
        ({"start": 64, "max_rank": 2}, "from 64 to 2"),
        ({"start": 2, "max_rank": 24}, "from 2 to 24"),
        ({"epsilon": 0}, "must be above 0"),
        ({"epsilon": float("nan")}, "nan is no number"),
        ({"scale": -1.0}, "must be above 0"),
        ({"scale": None}, "None is no number"),
        ({"law": {}}, "the law must have"),
        ({"law": None}, "no rank schedule"),
        ({"law": {n: {"value": -1.0, "interval": None} for n in "abc"}}, "b of at least 0"),
        ({"gains": {"1": {"value": 0.1, "interval": [0.2, 0.1]}}}, "no interval"),
        ({"gains": {"1": {"value": 0.1, "interval": [0.2]}}}, "no rank schedule"),
        ({"gains": {"one": {"value": 0.1, "interval": None}}}, "no rank schedule"),
        ({"gains": [0.1]}, "no rank schedule"),
    ],
    ids=str,
)
def test_invalid_values_are_refused(tmp_path, content, change, message):
    path = tmp_path / "ranks.json"
    path.write_text(json.dumps(content | change))
    with pytest.raises(UserError, match=f"ranks.json.*{message}.*make one with tools/benchmarks/rank_law.py"):
        load_schedule(path)


@pytest.mark.parametrize("name", ["start", "max_rank", "epsilon", "scale", "law", "gains", "verdict"])
def test_a_missing_field_is_named(tmp_path, content, name):
    del content[name]
    (tmp_path / "ranks.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"no rank schedule .*{name}"):
        load_schedule(tmp_path / "ranks.json")


@pytest.mark.parametrize("text", ["", "start: 4", "[1, 2]", "4", "[" * 100_000, b"\xff\xfe"], ids=range(6))
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "ranks.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match="rank schedule"):
        load_schedule(path)


def test_files_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(UserError, match=r"missing.json: cannot be read \(No such file"):
        load_schedule(tmp_path / "missing.json")
    with pytest.raises(UserError, match="cannot be read"):
        load_schedule(tmp_path)
    schedule = rank_schedule(law(0.5, (0.5,)), 0.01, 2.0)
    with pytest.raises(UserError, match="cannot be written"):
        save_schedule(schedule, tmp_path / "nowhere" / "ranks.json", {})
