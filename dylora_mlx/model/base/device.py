"""Limits of MLX's allocator, from what the machine has.

MLX keeps freed buffers for the next operation. Left alone that cache may grow to nearly all of a device's memory, which
on a Mac is everybody's, and without any the CPU backend asks the system for fresh pages at every operation.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import mlx.core as mx

from dylora_mlx.model.kernels import numerics

GPU_SHARE, CPU_SHARE = 4, 8
"""The cache may take one part in so many of a GPU's or of the machine's memory."""
CPU_CACHE = 2 << 30
"""More than this helps no CPU."""


class MemoryLimits(NamedTuple):
    """In bytes: memory that stays resident on a Mac's GPU, and the cache of freed buffers. None: MLX's own."""

    wired: int | None
    cache: int | None


def memory_limits(device: str, info: Mapping[str, str | int], total: int | None) -> MemoryLimits:
    """Limits for a device: "metal", "cuda" or "cpu".

    info: of the GPU, as `mx.device_info` gives it; total: the machine's memory in bytes, None if it is not known.
    """
    if device == "cpu":
        return MemoryLimits(None, CPU_CACHE if total is None else min(CPU_CACHE, total // CPU_SHARE))
    size = info.get("max_recommended_working_set_size" if device == "metal" else "total_memory")
    if not isinstance(size, int) or size <= 0:
        return MemoryLimits(None, None)
    return MemoryLimits(size if device == "metal" else None, size // GPU_SHARE)


def set_memory_limits() -> None:
    """Set the limits for the device in use; MLX's own stay where nothing is known of it."""
    found = memory_limits(device_kind(), mx.device_info(), physical_memory())
    if found.wired is not None:
        mx.set_wired_limit(found.wired)
    if found.cache is not None:
        mx.set_cache_limit(found.cache)


def device_kind() -> str:
    """metal, cuda or cpu."""
    if numerics.on_cpu():
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def physical_memory() -> int | None:
    """Physical memory in bytes."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
