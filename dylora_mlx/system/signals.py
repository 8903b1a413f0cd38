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
_asked: int | None = None


class Interrupted(BaseException):
    """Work that left because it was asked to. The exit code is the shell's convention for the signal."""

    def __init__(self, signum: int, said: str):
        super().__init__(said)
        self.code = 128 + signum


@contextmanager
def heard() -> Iterator[None]:
    """While this lasts, signals only ask. Off the main thread, where none arrive, it does nothing."""
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, _ask) for signum in SIGNALS}
    try:
        yield
    finally:
        _asked = None
        for signum, handler in before.items():
            signal.signal(signum, handler)


def asked() -> bool:
    return _asked is not None


def leave(said: str) -> NoReturn:
    """Raises Interrupted because of a signal, which may have come to another process of the run. said: what state things
    are left in, and how to go on."""
    raise Interrupted(signal.SIGTERM if _asked is None else _asked, said)


def _ask(signum: int, _: FrameType | None) -> None:
    global _asked
    if _asked is not None:
        os._exit(128 + signum)  # what is on the disk is whole at any moment
    _asked = signum
    os.write(2, b"\nstopping at the next safe place; once more leaves at once\n")
