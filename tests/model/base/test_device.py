"""Memory limits of MLX's allocator, derived from the device information."""

from __future__ import annotations

import os

import mlx.core as mx
import pytest

from dylora_mlx.model.base import device
from dylora_mlx.model.base.device import MemoryLimits
from dylora_mlx.model.kernels import numerics

GB = 1 << 30


@pytest.mark.parametrize(
    ("kind", "info", "memory", "expected"),
    [
        (
            "metal",
            {"max_recommended_working_set_size": 12 * GB, "memory_size": 16 * GB},
            16 * GB,
            (12 * GB, 3 * GB),
        ),
        ("metal", {"device_name": "Apple Paravirtual device"}, 16 * GB, (None, None)),
        ("cuda", {"total_memory": 24 * GB, "free_memory": GB}, 64 * GB, (None, 6 * GB)),
        ("cuda", {"architecture": "sm_90"}, 64 * GB, (None, None)),
        ("cuda", {"total_memory": 0}, 64 * GB, (None, None)),
        ("cpu", {"architecture": "x86_64"}, 64 * GB, (None, 2 * GB)),
        ("cpu", {"architecture": "arm64"}, 8 * GB, (None, GB)),
        ("cpu", {}, None, (None, 2 * GB)),
    ],
)
def test_memory_limits_by_device(kind, info, memory, expected):
    assert device.memory_limits(kind, info, memory) == MemoryLimits(*expected)


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
            "cpu": {"cache": GB},
            "metal": {"wired": 8 * GB, "cache": 2 * GB},
            "cuda": {"cache": 4 * GB},
        }[kind]
    )


def test_physical_memory(monkeypatch):
    memory = device.physical_memory()
    assert memory is None or memory > GB // 4

    def unknown(_):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", unknown)
    assert device.physical_memory() is None
