"""What goes wrong in a run that nobody made: a full disk, too little memory. One line: what, what is left, what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from dylora_mlx.errors import Failure, UserError
from dylora_mlx.interrupts import Interrupted
from dylora_mlx.training.run import Run

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


def left(run: Run) -> str:
    """Where a run stands that leaves now, and how to go on."""
    return f"stopped at step {run.state.step}; nothing is lost, go on with: python -m dylora_mlx.train --resume {run.folder}"


@contextmanager
def told(run: Run) -> Iterator[None]:
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
        what = f"{error.filename or run.folder}: {error.strerror or error}"
        raise Failure(f"{what}; {DISK.get(error.errno or 0, 'mend it')}, then {_resume(run)}") from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, Failure):
            raise
        said = (str(error).splitlines() or ["out of memory"])[0]
        if isinstance(error, MemoryError) or any(word in said.lower() for word in ALLOCATION):
            raise Failure(
                f"out of memory ({said[:120]}); lower training.batch_rows or data.row_length, or set "
                f"training.grad_checkpoint: true, in a new run; other programs closed, {_resume(run)}"
            ) from error
        if "safetensors" in said or "[save" in said:  # MLX's own words for a write that failed
            raise Failure(f"{run.folder}: {said[:200]}; free some space, then {_resume(run)}") from error
        raise
    finally:
        run.release(code)


def _resume(run: Run) -> str:
    return f"go on with: python -m dylora_mlx.train --resume {run.folder}"
