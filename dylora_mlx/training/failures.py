"""Turn system failures of a run (full disk, out of memory, lost rank) into one-line errors.

Each message states the problem, what is preserved, and how to resume.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dylora_mlx.distributed.group import RankLost
from dylora_mlx.errors import Failure, UserError
from dylora_mlx.system import files
from dylora_mlx.system.signals import Interrupted
from dylora_mlx.training.checkpoint.state import TrainerState
from dylora_mlx.training.run import TrainingRun

DISK = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, the quota is used up",
    errno.EROFS: "make the file system writable",
    errno.EACCES: "restore write permission there",
    errno.EPERM: "restore write permission there",
    errno.EIO: "check the disk for errors",
}
"""Advice by errno for an OSError while a run writes its files."""
ALLOCATION = ("unable to allocate", "out of memory", "insufficient memory", "malloc", "bad_alloc")
"""Lower-case substrings of MLX's error messages when an allocation fails, on any backend."""


def resume_hint(folder: Path, state: TrainerState) -> str:
    """Return the message of a run that stops now: its step, and the command that resumes it."""
    return f"stopped at step {state.step}; nothing is lost, go on with: python -m dylora_mlx.train --resume {folder}"


@contextmanager
def handle_failures(run: TrainingRun) -> Iterator[None]:
    """Convert OSError, MemoryError and MLX errors of a run into Failure, and release the run however the block ends.

    Interrupted, UserError and Failure pass through unchanged, except that RankLost gets the resume command added, and that
    a stop that a callback's exception asked for becomes a Failure with that exception.
    `run.release` receives the exit code: 0, the signal's code, or 1.
    """
    code = 1
    try:
        yield
        code = 0
    except Interrupted as error:
        if run.callbacks.failure is not None:
            message, cause = run.callbacks.failure
            raise Failure(f"{message}; {error}") from cause
        code = error.code
        raise
    except UserError:
        raise
    except OSError as error:
        raise write_failure(run.folder, error) from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RankLost):
            raise Failure(
                f"{error}; the last checkpoint is whole, {_resume_command(run.folder)}, on any number of ranks"
            ) from error
        if isinstance(error, Failure):
            raise
        # MLX has no exception type for a failed allocation or a failed write: only the message tells them apart.
        message = (str(error).splitlines() or ["out of memory"])[0]
        if isinstance(error, MemoryError) or any(word in message.lower() for word in ALLOCATION):
            raise Failure(
                f"out of memory ({message[:120]}); lower training.batch_size or data.max_seq_length, or set "
                f"training.grad_checkpoint: true, in a new run; other programs closed, {_resume_command(run.folder)}"
            ) from error
        if files.is_disk_full(error):
            raise write_failure(run.folder, error) from error
        raise
    finally:
        run.release(code)


def write_failure(folder: Path, error: Exception) -> Failure:
    """Return the Failure for a write that the system refused: the file, the reason, the remedy, the resume command.

    Any error that is not an OSError is taken for MLX's report of a full disk.
    """
    if not (folder / "config.yaml").is_file():
        return Failure(
            f"{folder}: the run folder is not there any more; if it was moved, its last checkpoint is whole, and it goes on "
            "with: python -m dylora_mlx.train --resume, and its new place"
        )
    if isinstance(error, OSError):
        problem, error_number = f"{error.filename or folder}: {error.strerror or error}", error.errno or 0
    else:
        problem, error_number = f"{folder}: {str(error).splitlines()[0][:200]}", errno.ENOSPC
    return Failure(f"{problem}; {DISK.get(error_number, 'fix the cause')}, then {_resume_command(folder)}")


def _resume_command(folder: Path) -> str:
    return f"go on with: python -m dylora_mlx.train --resume {folder}"
