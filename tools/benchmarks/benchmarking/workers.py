"""One process for each contender, so that their peaks of memory are their own, and turns to run in."""

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
    """A contender's process could not do what it was asked."""


class Worker:
    """A contender in a process of its own; it works only while it is asked to."""

    def __init__(self, contender: str, workload: Workload):
        context = multiprocessing.get_context("spawn")
        self.contender, (self.pipe, theirs) = contender, context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, contender, workload), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, request: str, *arguments: Any) -> Any:
        """Have the process do something and wait for its answer. Raises Failed with what went wrong there."""
        try:
            self.pipe.send((request, arguments))
            fine, answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join(5)
            raise Failed(f"{self.contender}: its process ended (exit code {self.process.exitcode})") from error
        if not fine:
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
        except Exception as error:  # whatever it is, the parent says which contender it was
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
    """Peak GB so far: of the device's arrays, of its allocator's cache, and of the process."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    if name == "peft":
        import torch

        if torch.cuda.is_available():
            found["peak"] = torch.cuda.max_memory_allocated() / 1e9
        return found
    import mlx.core as mx

    return found | {"peak": mx.get_peak_memory() / 1e9, "cache": mx.get_cache_memory() / 1e9}
