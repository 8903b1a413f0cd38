"""What goes wrong in a run that nobody made: a full disk, too little memory. One line: what, what is left, what to do."""

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
    errno.EACCES: "give back the permission to write there",
    errno.EPERM: "give back the permission to write there",
    errno.EIO: "look after the disk",
}
ALLOCATION = ("unable to allocate", "out of memory", "insufficient memory", "malloc", "bad_alloc")
"""In the messages of MLX's backends when memory has run out."""


def resume_hint(folder: Path, state: TrainerState) -> str:
    """Where a run stands that leaves now, and how to go on."""
    return f"stopped at step {state.step}; nothing is lost, go on with: python -m dylora_mlx.train --resume {folder}"


@contextmanager
def handle_failures(run: TrainingRun) -> Iterator[None]:
    """Let the run's lock go and W&B know in any case; raise Failure for what the system or MLX could not do."""
    code = 1
    try:
        yield
        code = 0
    except Interrupted as error:
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
        said = (str(error).splitlines() or ["out of memory"])[0]
        if isinstance(error, MemoryError) or any(word in said.lower() for word in ALLOCATION):
            raise Failure(
                f"out of memory ({said[:120]}); lower training.batch_size or data.max_seq_length, or set "
                f"training.grad_checkpoint: true, in a new run; other programs closed, {_resume_command(run.folder)}"
            ) from error
        if files.is_disk_full(error):
            raise write_failure(run.folder, error) from error
        raise
    finally:
        run.release(code)


def write_failure(folder: Path, error: Exception) -> Failure:
    """What to raise when the system could not write a run: what it was, what to mend, and how to go on."""
    if isinstance(error, OSError):
        what, number = f"{error.filename or folder}: {error.strerror or error}", error.errno or 0
    else:
        what, number = f"{folder}: {str(error).splitlines()[0][:200]}", errno.ENOSPC
    return Failure(f"{what}; {DISK.get(number, 'mend it')}, then {_resume_command(folder)}")


def _resume_command(folder: Path) -> str:
    return f"go on with: python -m dylora_mlx.train --resume {folder}"
