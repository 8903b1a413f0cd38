"""The parser shared by all commands, which reports a mistake in one line, and the exit codes."""

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
    """Appends the default to each option's help, unless the help already names it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        help_text = action.help or ""
        is_complete = action.default in (None, [], argparse.SUPPRESS) or action.nargs == 0 or "default:" in help_text
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        return help_text if is_complete else f"{help_text} (default: {str(default).replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError with one line, and prints the lines of its examples unchanged."""

    def __init__(self, prog: str, description: str | None, examples: str = ""):
        super().__init__(
            prog=prog, description=description, epilog=f"examples:\n{examples}" if examples else None,
            allow_abbrev=False, formatter_class=_HelpFormatter,
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def run_command(work: Callable[[list[str]], int], argv: list[str] | None = None, parallel: bool = False) -> int:
    """Run a command and return its exit code.

    Prints a UserError as one line (2), a Failure as one line (1) and an interrupt (130 or 143). A closed stdout pipe
    exits with 141, silently.

    Args:
        work: the command; takes the arguments and returns an exit code.
        argv: the arguments; None for those of the process.
        parallel: whether the command supports several ranks. Messages that all ranks share are printed by rank 0 alone.
    """
    try:
        if launcher.launched_rank() is not None and not parallel:
            raise UserError("this command does not work on several ranks, only train does; run it without mlx.launch")
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
        # Redirect stdout: the interpreter flushes it at exit, which would raise again on the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def check_run_name(name: str) -> str:
    """Return `name` if it is usable as a folder name. Raises UserError otherwise."""
    if name in ("", ".", "..") or {"/", "\\"} & set(name) or not name.isprintable() or len(name.encode()) > 200:
        raise UserError(f"--name {name[:80]}: a plain folder name is needed (use --runs for the folder around it)")
    return name
