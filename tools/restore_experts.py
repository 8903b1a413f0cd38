"""Put experts that a run merged or evicted back into its pool, from the run folder's own archive.

    python tools/restore_experts.py runs/NAME                          list what was removed
    python tools/restore_experts.py runs/NAME removed/001-evict        put it back into the final checkpoint

The skills that the experts held are theirs again, and the router is fitted anew to all remembered features. An expert that
they were merged into stays, for other skills may use it. The checkpoint that was there is kept as final.before-NNN.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from dylora_mlx.cli import parser as commands
from dylora_mlx.errors import UserError
from dylora_mlx.run import folder as runs
from dylora_mlx.system import console
from dylora_mlx.training.budget import archive
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint import state as states
from dylora_mlx.training.skill import fit_router as consolidate


def listing(run: Path) -> int:
    """Print every archive of a run."""
    found = sorted((run / "removed").glob("*/removed.json"))
    if not found:
        raise UserError(f"{run}: nothing was removed from this run")
    for path in found:
        described = archive.described(path.parent)
        skills = "; ".join(", ".join(item["skills"]) or item["record"].skill for item in described["experts"])
        console.say(f"removed/{path.parent.name}: {skills} (step {described.get('step', '?')})")
    return 0


def restore(run: Path, name: str) -> int:
    """Put an archive's experts back and write the final checkpoint anew. Raises UserError, also while another process works
    on the run."""
    with runs.locked(run):
        return _restore(run, name)


def _restore(run: Path, name: str) -> int:
    final = run / "checkpoints" / "final"
    if not final.is_dir():
        raise UserError(f"{run}: not finished; experts are put back into the final checkpoint")
    opened = runs.open_run(run, "float32")
    number = archive.number_of(run / name)
    if archive.is_in(run / name, opened.pool):
        raise UserError(f"{name}: these experts are in the pool already")
    columns = archive.put_back(run / name, opened.pool, opened.library)
    training, router = opened.config.training, opened.model.router
    remembered = consolidate.remembered(opened.library)
    before, after = consolidate.fit(router, remembered, training.router_fit_steps, training.memory_tokens)
    files = checkpoint.read(final) | states.pool_files(opened.base, opened.pool, opened.library)
    kept = final.with_name(f"final.before-{number:03d}")
    try:
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(final, kept)
        checkpoint.write(final, files)
    except (OSError, RuntimeError) as error:  # MLX raises the second kind
        raise UserError(
            f"{run}: cannot be written ({getattr(error, 'strerror', None) or error}); it is as it was"
        ) from error
    console.say(f"expert {', '.join(map(str, columns))} restored; router cross-entropy {before:.3f} -> {after:.3f}")
    console.say(f"the checkpoint that was there is {kept}")
    return 0


def command(argv: list[str]) -> int:
    parser = commands.Parser("python tools/restore_experts.py", __doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("archive", nargs="?", help="folder below it, as the listing names it")
    options = parser.parse_args(argv)
    if not (options.run / "config.yaml").is_file():
        raise UserError(f"{options.run}: no run here (no config.yaml)")
    return listing(options.run) if options.archive is None else restore(options.run, options.archive)


def main(argv: list[str] | None = None) -> int:
    return commands.guarded(command, argv)


if __name__ == "__main__":
    sys.exit(main())
