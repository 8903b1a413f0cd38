"""Set the limits of MLX's memory allocator from the memory of the machine.

MLX caches freed buffers for later operations. Without a limit, this cache may grow to nearly all of a device's memory,
which on a Mac is shared with every other program. A cached buffer serves only arrays of nearly its size, and on a CPU a
full cache keeps what it holds: buffers of an earlier kind of work then stay until the cache is cleared.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import mlx.core as mx

from dylora_mlx.model.kernels import numerics
from dylora_mlx.system import process

GPU_SHARE, CPU_SHARE = 4, 8
"""The cache may take 1 / GPU_SHARE of a GPU's memory, or 1 / CPU_SHARE of the machine's."""
CPU_CACHE, GPU_CACHE = 32 << 20, 1 << 30
"""Bytes of the cache that any work gets. On a GPU they hold tiles of logits, of 256 MB each."""
CPU_ACTIVATIONS, GPU_ACTIVATIONS = 24, 4
"""Copies of the widest activation that the cache may hold: on a GPU for each layer, on a CPU for one block's passes."""
MALLOC_REUSES = 32 << 20
"""Bytes up to which glibc's malloc reuses freed memory as fast as MLX's cache; it returns larger blocks to the system."""


class StepShape(NamedTuple):
    """What a training step needs, for the cache's limit."""

    layers: int
    activation: int
    """Bytes of the widest activation of a micro-batch, [rows, length, widest layer]."""


class MemoryLimits(NamedTuple):
    """Limits of MLX's allocator in bytes; None keeps MLX's default."""

    wired: int | None
    """Memory that stays resident (wired) on a Mac's GPU."""
    cache: int | None
    """Cache of freed buffers."""


def memory_limits(
    device: str, info: Mapping[str, str | int], total: int | None, step: StepShape | None = None
) -> MemoryLimits:
    """Return the limits for a device.

    Args:
        device: "metal", "cuda" or "cpu".
        info: Properties of the GPU, as `mx.device_info` returns them.
        total: The machine's memory in bytes; None if unknown.
        step: The training steps to come; None for other work.
    """
    layers, activation = step or (0, 0)
    if device == "cpu":
        needed = CPU_ACTIVATIONS * activation if activation > MALLOC_REUSES else CPU_CACHE
        return MemoryLimits(None, needed if total is None else min(needed, total // CPU_SHARE))
    size = info.get("max_recommended_working_set_size" if device == "metal" else "total_memory")
    if not isinstance(size, int) or size <= 0:
        return MemoryLimits(None, None)
    needed = max(GPU_CACHE, GPU_ACTIVATIONS * layers * activation)
    return MemoryLimits(size if device == "metal" else None, min(needed, size // GPU_SHARE))


def current_limits(step: StepShape | None = None) -> MemoryLimits:
    """Return the limits for the device in use."""
    return memory_limits(device_kind(), mx.device_info(), physical_memory(), step)


def set_memory_limits(step: StepShape | None = None) -> None:
    """Set the limits for the device in use. MLX's defaults stay if the device's memory is unknown.

    `step` describes the training steps to come; None for other work.
    """
    limits = current_limits(step)
    if limits.wired is not None:
        mx.set_wired_limit(limits.wired)
    if limits.cache is not None:
        mx.set_cache_limit(limits.cache)
    process.share_malloc_arena()


def release_freed_memory() -> None:
    """Release the buffers that MLX caches and what malloc holds, between phases of work that need other sizes."""
    mx.clear_cache()
    process.return_freed_memory()


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
