"""Memory limits of MLX's allocator, derived from the device information."""

from __future__ import annotations

import os

import mlx.core as mx
import pytest

from dylora_mlx.model.base import device
from dylora_mlx.model.base.device import MemoryLimits, StepShape
from dylora_mlx.model.kernels import numerics

GB, MB = 1 << 30, 1 << 20
GEMMA = StepShape(18, 4 * 512 * 2048 * 4)
"""Gemma 3 270M with 4 rows of 512 in float32."""


@pytest.mark.parametrize(
    ("kind", "info", "memory", "step", "expected"),
    [
        (
            "metal",
            {"max_recommended_working_set_size": 12 * GB, "memory_size": 16 * GB},
            16 * GB,
            None,
            (12 * GB, GB),
        ),
        ("metal", {"max_recommended_working_set_size": 2 * GB}, 3 * GB, None, (2 * GB, GB // 2)),
        ("metal", {"max_recommended_working_set_size": 12 * GB}, 16 * GB, GEMMA, (12 * GB, 18 * 4 * 16 * MB)),
        ("metal", {"device_name": "Apple Paravirtual device"}, 16 * GB, GEMMA, (None, None)),
        ("cuda", {"total_memory": 24 * GB, "free_memory": GB}, 64 * GB, None, (None, GB)),
        ("cuda", {"total_memory": 24 * GB}, 64 * GB, StepShape(34, 64 * MB), (None, 6 * GB)),
        ("cuda", {"architecture": "sm_90"}, 64 * GB, None, (None, None)),
        ("cuda", {"total_memory": 0}, 64 * GB, None, (None, None)),
        ("cpu", {"architecture": "x86_64"}, 64 * GB, None, (None, 32 * MB)),
        ("cpu", {"architecture": "x86_64"}, 64 * GB, StepShape(6, MB), (None, 32 * MB)),
        ("cpu", {"architecture": "x86_64"}, 64 * GB, GEMMA, (None, 32 * MB)),
        ("cpu", {"architecture": "arm64"}, 16 * GB, StepShape(18, 40 * MB), (None, 24 * 40 * MB)),
        ("cpu", {"architecture": "arm64"}, GB, StepShape(18, 40 * MB), (None, 128 * MB)),
        ("cpu", {}, None, StepShape(18, 40 * MB), (None, 24 * 40 * MB)),
    ],
)
def test_memory_limits_by_device(kind, info, memory, step, expected):
    assert device.memory_limits(kind, info, memory, step) == MemoryLimits(*expected)


def test_the_widest_activation_of_a_base(base):
    """The embedded base has 6 layers; the widest of its layers is the MLP, 640 values in float32."""
    assert base.step_shape(4, 512) == StepShape(6, 4 * 512 * 640 * 4)


@pytest.mark.parametrize(
    ("on_cpu", "metal", "kind"),
    [(True, False, "cpu"), (True, True, "cpu"), (False, True, "metal"), (False, False, "cuda")],
)
def test_set_memory_limits_sets_the_known_limits(monkeypatch, on_cpu, metal, kind):
    info = {"max_recommended_working_set_size": 8 * GB, "total_memory": 16 * GB}
    calls = {}
    monkeypatch.setattr(numerics, "on_cpu", lambda: on_cpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "set_wired_limit", lambda size: calls.update(wired=size))
    monkeypatch.setattr(mx, "set_cache_limit", lambda size: calls.update(cache=size))
    monkeypatch.setattr(device, "physical_memory", lambda: 8 * GB)
    device.set_memory_limits()
    assert (
        calls
        == {
            "cpu": {"cache": 32 * MB},
            "metal": {"wired": 8 * GB, "cache": GB},
            "cuda": {"cache": GB},
        }[kind]
    )


def test_physical_memory(monkeypatch):
    memory = device.physical_memory()
    assert memory is None or memory > GB // 4

    def unknown(_):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", unknown)
    assert device.physical_memory() is None
