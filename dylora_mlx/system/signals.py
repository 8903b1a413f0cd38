"""Graceful shutdown on SIGINT and SIGTERM.

The first signal sets a flag that long work checks at safe points (`stop_requested`). The second exits immediately.
"""

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
"""The signal that arrived within `defer_signals`; None if none did."""


class Interrupted(BaseException):
    """Raised at a safe point after a signal. The exit code is the shell's convention, 128 + the signal's number.

    A BaseException, so that no `except Exception` swallows it.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.code = 128 + signum


@contextmanager
def defer_signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into stop requests within the block. Does nothing off the main thread, which gets no signals."""
    global _requested_signal
    if threading.current_thread() is not threading.main_thread():
        try:
            yield
        finally:
            _requested_signal = None  # of `request_stop`
        return
    previous_handlers = {signum: signal.signal(signum, _request_stop) for signum in SIGNALS}
    try:
        yield
    finally:
        _requested_signal = None
        for signum, handler in previous_handlers.items():
            signal.signal(signum, handler)


def stop_requested() -> bool:
    """Return whether a signal arrived within `defer_signals`."""
    return _requested_signal is not None


def request_stop() -> None:
    """Ask the work within `defer_signals` to stop at the next safe point, as SIGTERM does."""
    global _requested_signal
    if _requested_signal is None:
        _requested_signal = signal.SIGTERM


def raise_interrupted(message: str) -> NoReturn:
    """Raise Interrupted for the signal that arrived, or for SIGTERM if it arrived at another rank only.

    Args:
        message: the state that the run is left in, and how to resume it.
    """
    raise Interrupted(signal.SIGTERM if _requested_signal is None else _requested_signal, message)


def _request_stop(signum: int, _: FrameType | None) -> None:
    global _requested_signal
    if _requested_signal is not None:
        os._exit(128 + signum)  # safe at any moment: files and checkpoints are replaced atomically
    _requested_signal = signum
    # os.write instead of print: a signal handler may interrupt a buffered write, which must not be reentered.
    os.write(2, b"\nstopping at the next safe place; once more leaves at once\n")
