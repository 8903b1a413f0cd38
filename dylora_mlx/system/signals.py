"""SIGINT and SIGTERM: the first asks long work to leave at its next safe place, the second leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_requested_signal: int | None = None


class Interrupted(BaseException):
    """Work that left because it was asked to. The exit code is the shell's convention for the signal."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.code = 128 + signum


@contextmanager
def defer_signals() -> Iterator[None]:
    """While this lasts, signals only ask. Off the main thread, where none arrive, it does nothing."""
    global _requested_signal
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, _request_stop) for signum in SIGNALS}
    try:
        yield
    finally:
        _requested_signal = None
        for signum, handler in before.items():
            signal.signal(signum, handler)


def stop_requested() -> bool:
    return _requested_signal is not None


def raise_interrupted(message: str) -> NoReturn:
    """Raises Interrupted because of a signal, which may have come to another process of the run. said: what state things
    are left in, and how to go on."""
    raise Interrupted(signal.SIGTERM if _requested_signal is None else _requested_signal, message)


def _request_stop(signum: int, _: FrameType | None) -> None:
    global _requested_signal
    if _requested_signal is not None:
        os._exit(128 + signum)  # what is on the disk is whole at any moment
    _requested_signal = signum
    os.write(2, b"\nstopping at the next safe place; once more leaves at once\n")
