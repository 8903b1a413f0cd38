"""The BLAS of MLX on Linux: found before MLX is imported, and a warning if it is not."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import mlx.core as mx
import pytest

from dylora_mlx.system import blas

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="macOS has Accelerate")
WARNING = "mlx was imported before dylora_mlx"
C_LIBRARY = "libc.so.6"
"""A library that is there, in place of a BLAS."""


@pytest.fixture
def late(monkeypatch) -> pytest.MonkeyPatch:
    """Put `blas` in the state of a package that is imported after MLX, which is slow, where a BLAS would have been there."""
    monkeypatch.setattr(blas, "_library_name", None)
    monkeypatch.setattr(blas, "_library", None)
    monkeypatch.setattr(blas, "_global_blas", lambda: "")
    monkeypatch.setattr(blas, "_mlx_is_slow", lambda: True)
    monkeypatch.setattr(blas, "_candidates", lambda: ["libnothing.so.9", C_LIBRARY])
    return monkeypatch


def test_the_wrong_order_is_one_warning(late, capsys):
    blas.preload()
    blas.preload()
    err = capsys.readouterr().err
    assert err.count(WARNING) == err.count("\n") == 1
    assert err.strip().endswith("Restart Python and import dylora_mlx before mlx")
    assert blas.describe().startswith("MLX's own (slow")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_candidates", lambda: ["libnothing.so.9"]),
        ("_mlx_is_slow", lambda: False),
        ("_global_blas", lambda: C_LIBRARY),
    ],
    ids=["no fast BLAS is there", "another build or device", "loaded by someone else"],
)
def test_no_warning_where_the_order_changes_nothing(late, capsys, name, value):
    late.setattr(blas, name, value)
    blas.preload()
    assert capsys.readouterr().err == ""
    assert blas.describe().startswith("OpenBLAS (libc" if name == "_global_blas" else "MLX's own")


def test_a_gpu_needs_no_blas(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert not blas._mlx_is_slow()


@pytest.mark.skipif(not blas._library_name, reason="no fast BLAS is installed")
@pytest.mark.parametrize(
    ("imports", "preloaded", "warns"),
    [("mlx.core, dylora_mlx", False, True), ("mlx.core, dylora_mlx", True, False), ("dylora_mlx, mlx.core", False, False)],
)  # fmt: skip
def test_a_process(imports, preloaded, warns):
    """Which library MLX's products call: that of LD_PRELOAD if there is one, whatever the order."""
    path = blas._global_blas()
    program = f"import {imports}; from dylora_mlx.system import blas; print(blas._global_blas(), blas.describe())"
    environment = {**os.environ, **({"LD_PRELOAD": path} if preloaded else {})}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert (WARNING in ran.stderr) == warns, ran.stderr
    assert ran.stdout.startswith(" MLX's own (slow" if warns else f"{path} {blas.describe()}")
