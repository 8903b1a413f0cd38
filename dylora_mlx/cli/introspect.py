"""The parser of a command, without running the command: for completion, docs/reference.md and tests."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Parsed(BaseException):
    """Raised in place of running a command, once it calls `parse_args`.

    Carries the parser. A BaseException, so that no handler of the command catches it.
    """

    def __init__(self, parser: argparse.ArgumentParser):
        super().__init__()
        self.parser = parser


@contextmanager
def stopped(parse: bool) -> Iterator[None]:
    """Make every `parse_args` raise `Parsed`: after it has parsed its arguments if `parse`, otherwise before."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        if parse:
            original(self, *args, **kwargs)
        raise Parsed(self)

    argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_args = original  # type: ignore[method-assign]


def parser_of(main: Callable[[list[str]], int]) -> argparse.ArgumentParser:
    """Return the parser that a command's `main` makes. Raises RuntimeError if it parses nothing."""
    try:
        with stopped(parse=False):
            main([])
    except Parsed as parsed:
        return parsed.parser
    raise RuntimeError(f"{main.__module__} did not call parse_args")
