"""Seconds and peaks of a run, kept from one of its processes to the next."""

from __future__ import annotations

import mlx.core as mx
import pytest

from dylora_mlx.system import process
from dylora_mlx.training.metrics.timers import OTHER, Timers, valid_totals

RECORDED = {"seconds": {"steps": 2.5, OTHER: 1.0}, "memory": 10**15, "resident": 2 * 10**15, "disk": 7, "steps": 3}


def test_peaks_are_those_of_the_whole_run(monkeypatch):
    """A resumed run keeps the peaks of its earlier process if its own are lower."""
    totals = Timers(RECORDED).totals()
    assert (totals["memory"], totals["resident"]) == (10**15, 2 * 10**15)
    assert totals["seconds"]["steps"] == 2.5
    monkeypatch.setattr(process, "peak_resident", lambda: 5 * 10**15)
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 3 * 10**15)
    totals = Timers(RECORDED).totals()
    assert (totals["memory"], totals["resident"]) == (3 * 10**15, 5 * 10**15)


def test_a_folder_without_the_process_counts_it_as_unknown():
    earlier = {name: value for name, value in RECORDED.items() if name != "resident"}
    assert valid_totals(RECORDED) == RECORDED
    assert valid_totals(earlier) == earlier | {"resident": 0}


@pytest.mark.parametrize("name", ["seconds", "memory", "disk", "steps"])
def test_other_fields_are_required(name):
    assert valid_totals({other: value for other, value in RECORDED.items() if other != name}) is None
    assert valid_totals(RECORDED | {"resident": "much"}) is None
