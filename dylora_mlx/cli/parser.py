"""What all commands share: a parser whose mistakes are one line, and exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from dylora_mlx.distributed import launcher
from dylora_mlx.errors import Failure, UserError
from dylora_mlx.system.signals import Interrupted


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Says what an option is if it is not given, so that no help text has to."""

    def _get_help_string(self, action: argparse.Action) -> str:
        about = action.help or ""
        unsaid = action.default in (None, [], argparse.SUPPRESS) or action.nargs == 0 or "default:" in about
        given = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        return about if unsaid else f"{about} (default: {str(given).replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """Raises UserError for a mistake, with one line; shows the lines of its examples as they are."""

    def __init__(self, prog: str, description: str | None, examples: str = ""):
        super().__init__(
            prog=prog, description=description, epilog=f"examples:\n{examples}" if examples else None,
            allow_abbrev=False, formatter_class=_HelpFormatter,
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def run_command(work: Callable[[list[str]], int], argv: list[str] | None = None, parallel: bool = False) -> int:
    """Run a command; print a user's mistake as one line and return 2, a failure and return 1, an interrupt and return 130 or
    143; a reader of our output that is gone is no error to speak of (141). parallel: it may be one of several ranks; what
    all of them would say alike, rank 0 says."""
    try:
        if launcher.launched_rank() is not None and not parallel:
            raise UserError("this command does not work on several ranks, train alone does; run it without mlx.launch")
        return work(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        if launcher.prints_messages():
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Failure as error:
        print(f"failed: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except Interrupted as error:
        if launcher.prints_messages():
            print(error, file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has had enough; the interpreter must not try to write the rest at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def check_run_name(name: str) -> str:
    if name in ("", ".", "..") or {"/", "\\"} & set(name) or not name.isprintable() or len(name.encode()) > 200:
        raise UserError(f"--name {name[:80]}: a plain folder name is needed (use --runs for the folder around it)")
    return name
