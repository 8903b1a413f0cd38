"""Worker processes, one per contender, so that each has its own peak of memory and runs only in its turn."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from benchmarking.workload import Workload


class Failed(RuntimeError):
    """A contender's process ended, or could not complete a request."""


class Worker:
    """A contender in its own process, which works only on request."""

    def __init__(self, contender: str, workload: Workload):
        context = multiprocessing.get_context("spawn")
        self.contender, (self.pipe, child_pipe) = contender, context.Pipe()
        self.process = context.Process(target=_serve, args=(child_pipe, contender, workload), daemon=True)
        self.process.start()
        child_pipe.close()

    def ask(self, request: str, *arguments: Any) -> Any:
        """Send a request, wait, and return the answer. Raises Failed with the error of the process."""
        try:
            self.pipe.send((request, arguments))
            succeeded, answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join(5)
            raise Failed(f"{self.contender}: its process ended (exit code {self.process.exitcode})") from error
        if not succeeded:
            raise Failed(f"{self.contender}: {answer}")
        return answer

    def close(self) -> None:
        self.process.terminate()
        self.process.join()


def _serve(pipe: Connection, name: str, workload: Workload) -> None:
    contender: Any = None
    while True:
        request, arguments = pipe.recv()
        try:
            if request == "start":
                contender = _start(name, workload, *arguments)
                answer: Any = None
            elif request == "step":
                answer = tuple(contender.step())
            elif request == "memory":
                answer = memory(name)
            elif request == "matmuls":
                from benchmarking import matmuls

                answer = matmuls.measure(workload, *arguments)
            else:
                answer = getattr(contender, request)(*arguments)
            pipe.send((True, answer))
        except Exception as error:  # report every error to the parent, which adds the contender's name
            traceback.print_exc(file=sys.stderr)
            pipe.send((False, f"{type(error).__name__}: {error}"))


def _start(name: str, workload: Workload, cache_gb: float) -> Any:
    from benchmarking.contenders import CONTENDERS

    if name != "peft":
        import mlx.core as mx

        mx.set_cache_limit(int(cache_gb * 2**30))
    contender = CONTENDERS[name](workload)
    started = time.perf_counter()
    contender.step()
    contender.first = time.perf_counter() - started
    return contender


def memory(name: str) -> dict[str, float]:
    """Return memory in GB: the peak of the process ("rss"), the peak of the device's arrays, and MLX's allocator cache.

    PEFT has no cache entry, and a device peak only on CUDA.
    """
    # ru_maxrss is in bytes on macOS and in KiB on Linux.
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit / 1e9}
    if name == "peft":
        import torch

        if torch.cuda.is_available():
            peaks["peak"] = torch.cuda.max_memory_allocated() / 1e9
        return peaks
    import mlx.core as mx

    return peaks | {"peak": mx.get_peak_memory() / 1e9, "cache": mx.get_cache_memory() / 1e9}
