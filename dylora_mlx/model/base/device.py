"""Set the limits of MLX's memory allocator from the memory of the machine.

MLX caches freed buffers for later operations. Without a limit, this cache may grow to nearly all of a device's memory,
which on a Mac is shared with every other program. Without any cache, the CPU backend requests fresh pages from the
operating system for every operation.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import mlx.core as mx

from dylora_mlx.model.kernels import numerics

GPU_SHARE, CPU_SHARE = 4, 8
"""The cache may take 1 / GPU_SHARE of a GPU's memory, or 1 / CPU_SHARE of the machine's."""
CPU_CACHE = 2 << 30
"""Upper bound of the CPU cache in bytes (2 GiB); a larger one does not help."""


class MemoryLimits(NamedTuple):
    """Limits of MLX's allocator in bytes; None keeps MLX's default."""

    wired: int | None
    """Memory that stays resident (wired) on a Mac's GPU."""
    cache: int | None
    """Cache of freed buffers."""


def memory_limits(device: str, info: Mapping[str, str | int], total: int | None) -> MemoryLimits:
    """Return the limits for a device.

    Args:
        device: "metal", "cuda" or "cpu".
        info: Properties of the GPU, as `mx.device_info` returns them.
        total: The machine's memory in bytes; None if unknown.
    """
    if device == "cpu":
        return MemoryLimits(None, CPU_CACHE if total is None else min(CPU_CACHE, total // CPU_SHARE))
    size = info.get("max_recommended_working_set_size" if device == "metal" else "total_memory")
    if not isinstance(size, int) or size <= 0:
        return MemoryLimits(None, None)
    return MemoryLimits(size if device == "metal" else None, size // GPU_SHARE)


def set_memory_limits() -> None:
    """Set the limits for the device in use. MLX's defaults stay if the device's memory is unknown."""
    limits = memory_limits(device_kind(), mx.device_info(), physical_memory())
    if limits.wired is not None:
        mx.set_wired_limit(limits.wired)
    if limits.cache is not None:
        mx.set_cache_limit(limits.cache)


def device_kind() -> str:
    """Return the kind of the device in use: metal, cuda or cpu."""
    if numerics.on_cpu():
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def physical_memory() -> int | None:
    """Return the machine's physical memory in bytes; None if unknown."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
