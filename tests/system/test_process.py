"""Resident memory of the process, as each system tells it, and malloc's free memory given back."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dylora_mlx.system import process

MB = 1 << 20


HELD = """
import numpy as np
from dylora_mlx.system import process
before = process.resident()
held = np.ones(64 << 20, np.uint8)
after, peak = process.resident(), process.peak_resident()
del held
print(before, after, peak, process.resident(), process.peak_resident())
"""


def test_resident_memory_follows_what_is_held():
    """In a process of its own: malloc may serve an array from what other tests have freed, and keep it."""
    printed = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True).stdout
    before, after, peak, freed, last_peak = map(int, printed.split())
    assert after - before == pytest.approx(64 * MB, rel=0.1)
    assert peak >= after - MB
    assert freed == pytest.approx(before, abs=8 * MB)
    assert last_peak >= after - MB


@pytest.fixture
def without_proc(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("/proc/self/statm")

    monkeypatch.setattr(Path, "read_text", missing)


def test_without_proc_ps_is_asked(without_proc, monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        return SimpleNamespace(stdout=b"  2048\n")

    monkeypatch.setattr(process.subprocess, "run", run)
    assert process.resident() == 2 * MB
    assert commands == [["ps", "-o", "rss=", "-p", str(os.getpid())]]


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps")
def test_ps_understands_the_question(without_proc):
    assert 16 * MB < process.resident() <= process.peak_resident() + MB


def test_without_proc_and_ps_the_peak_is_told(without_proc, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert process.resident() == pytest.approx(process.peak_resident(), abs=MB)


@pytest.mark.parametrize(("platform", "expected"), [("linux", 7 * 1024), ("darwin", 7)])
def test_the_peak_is_in_kilobytes_on_linux_and_in_bytes_on_macos(monkeypatch, platform, expected):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=7))
    assert process.peak_resident() == expected


@pytest.mark.parametrize(
    ("functions", "expected"),
    [
        (["mallopt", "malloc_trim"], ["mallopt(-8, 1)", "malloc_trim(0)"]),
        (["malloc_zone_pressure_relief"], ["malloc_zone_pressure_relief(None, 0)"]),
        ([], []),
    ],
)
def test_each_c_library_is_asked_for_what_it_has(monkeypatch, functions, expected):
    """glibc, macOS, and a library without either, such as musl."""
    calls = []

    def function(name):
        return lambda *given: calls.append(f"{name}({', '.join(str(getattr(v, 'value', v)) for v in given)})")

    library = SimpleNamespace(**{name: function(name) for name in functions})
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    process.share_malloc_arena()
    process.return_freed_memory()
    assert calls == expected
