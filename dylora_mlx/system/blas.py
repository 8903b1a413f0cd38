"""Load a fast BLAS before MLX on Linux.

MLX's Linux wheel carries an unoptimised BLAS. The dynamic linker takes the first `cblas_sgemm` that it
finds among the globally loaded libraries. So loading MKL or OpenBLAS first makes every CPU matrix
product of MLX some 15 to 40 times as fast. It must happen before the first `import mlx.core`, which
is why the package does it on import. macOS has Accelerate and needs nothing.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path

NUM_STREAMS = min(2, os.cpu_count() or 1)
"""Pieces of work that a CPU computes concurrently, each on its own MLX stream. The cores are divided among them
(see model/kernels/streams.py)."""

_processes = 1
"""Ranks on this machine, among which the cores are divided."""
_library_name: str | None = None
"""Name or path of the BLAS that `preload` loaded; "" if it loaded none, None before it ran."""
_library: ctypes.CDLL | None = None


def _candidates() -> list[str]:
    """List the libraries to try, best first: pip's MKL beside this interpreter, then the system's OpenBLAS and MKL."""
    folders = [Path(sys.prefix) / "lib", Path(sys.base_prefix) / "lib", Path.home() / ".local" / "lib"]
    mkl = [str(path) for folder in folders for path in sorted(folder.glob("libmkl_rt.so.*"), reverse=True)]
    return [*mkl, "libopenblas.so.0", "libopenblas.so", "libmkl_rt.so.3", "libmkl_rt.so.2"]


def preload() -> None:
    """Load the first available BLAS into the global symbol namespace. Do nothing off Linux.

    Once MLX is imported this has no effect, so then it only warns if MLX is slow and would not have been.
    """
    global _library_name, _library
    if platform.system() != "Linux" or _library_name is not None:
        return
    if "mlx.core" in sys.modules:
        _library_name = _global_blas()
        if _library_name:
            _library = ctypes.CDLL(_library_name)
            set_threads(1)
        elif _mlx_is_slow() and _open_first(ctypes.RTLD_LOCAL)[0]:
            from dylora_mlx.system import console  # imported here: importing the package is to be fast

            console.warn(
                "mlx was imported before dylora_mlx, and so found no fast BLAS: matrix products take about ten times as long. "
                "Restart Python and import dylora_mlx before mlx"
            )
        return
    # RTLD_GLOBAL puts the symbols where the linker looks when it later binds MLX's cblas_sgemm.
    _library_name, _library = _open_first(ctypes.RTLD_GLOBAL)
    set_threads(1)


def _open_first(mode: int) -> tuple[str, ctypes.CDLL | None]:
    """Open the first candidate that is there, and return its name too; "" and None if there is none."""
    for name in _candidates():
        try:
            return name, ctypes.CDLL(name, mode=mode)
        except OSError:
            continue
    return "", None


class _SymbolInfo(ctypes.Structure):
    """Dl_info of dladdr(3)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _global_blas() -> str:
    """Return the path of the library that was loaded globally and has cblas_sgemm, such as by LD_PRELOAD; "" if there is none."""
    process, info = ctypes.CDLL(None), _SymbolInfo()
    try:
        found = process.dladdr(ctypes.cast(process.cblas_sgemm, ctypes.c_void_p), ctypes.byref(info))
    except AttributeError:
        return ""
    return os.fsdecode(info.file) if found and info.file else ""


def _mlx_is_slow() -> bool:
    """Whether MLX, which is imported, computes on a CPU with the BLAS of its own wheel. Another build may have a fast one."""
    mx, maps = sys.modules["mlx.core"], Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    files = {Path(line.split()[-1]) for line in lines if "libblas" in line}
    in_wheel = any(file.parent.name.startswith("mlx") and file.parent.name.endswith(".libs") for file in files)
    return in_wheel and mx.default_device() == mx.Device(mx.cpu)


def share_cores(processes: int) -> None:
    """Divide the cores among the ranks on this machine. `processes` counts them, this one included."""
    global NUM_STREAMS, _processes
    _processes = processes
    NUM_STREAMS = min(2, max(1, (os.cpu_count() or 1) // processes))
    set_threads(1)


def set_threads(streams: int) -> None:
    """Set the BLAS threads of one matrix product, so that `streams` concurrent ones use this rank's share of the cores."""
    threads = max(1, (os.cpu_count() or 1) // (streams * _processes))
    for name in ("MKL_Set_Num_Threads", "openblas_set_num_threads"):
        setter = getattr(_library, name, None) if _library is not None else None
        if setter is not None:
            setter(ctypes.c_int(threads))


def describe() -> str:
    """Return one line that names the BLAS of MLX's CPU backend, with advice if no fast one was found."""
    if platform.system() != "Linux":
        return "Accelerate"
    if not _library_name:
        return "MLX's own (slow: `pip install mkl` on x86-64, or install your system's libopenblas0; import dylora_mlx before mlx)"
    library = Path(_library_name).name
    return f"{'MKL' if 'mkl' in library else 'OpenBLAS'} ({library})"
