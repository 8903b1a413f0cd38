"""The format of run folders, checked before anything in one is read.

The format number is stored in run.json for a run folder, and in MANIFEST.json for a checkpoint. Version 0.1 writes
format 1, and every later version reads it. A change of the layout, a file's name or a key must raise `FORMAT` and add a
migration to training/checkpoint/migrate.py. tests/run/test_format.py opens the stored folders of every format.

2: library entries, remembered features and rows of the loss matrix have files of their own in a checkpoint.
"""

from __future__ import annotations

from pathlib import Path

from dylora_mlx.errors import UserError
from dylora_mlx.system.files import read_json

FORMAT = 2


def is_readable(number: object) -> bool:
    """Return whether this version reads a format: the current one and every earlier one."""
    return type(number) is int and 1 <= number <= FORMAT


def check_run_folder(folder: Path) -> None:
    """Raise UserError unless `folder` is a run folder of a format that this version reads."""
    if not (folder / "config.yaml").is_file():
        raise UserError(_why_no_run(folder))
    check_format(folder)


def _why_no_run(folder: Path) -> str:
    """Return the message about a folder without config.yaml, which may be a checkpoint of a run, or one that was removed."""
    run = folder.absolute().parents[1] if len(folder.absolute().parents) > 1 else folder
    if folder.absolute().parent.name != "checkpoints" or not (run / "config.yaml").is_file():
        return f"{folder}: no run here (no config.yaml)"
    there = sorted(path.name for path in folder.absolute().parent.glob("[!.]*") if path.is_dir())
    what = "a checkpoint, not a run folder" if folder.is_dir() else "this checkpoint is not there, or not any more"
    return f"{folder}: {what}; give the run folder, {run}, which has {', '.join(there) or 'no checkpoint'}"


def check_format(folder: Path) -> None:
    """Raise UserError if the run.json of `folder` states a format that this version cannot read.

    A missing or damaged run.json is accepted: a run does not need it, and its checkpoints also store their format.
    """
    path = folder / "run.json"
    try:
        info = read_json(path)
    except UserError:
        return
    check_format_of(info, path)


def check_format_of(info: object, path: Path) -> None:
    """Raise UserError if the content of a run.json states a format that this version cannot read. `path` is named in it."""
    if not isinstance(info, dict) or is_readable(info.get("format", FORMAT)):
        return
    writer = info.get("dylora_mlx")
    version = f"dylora_mlx {writer:.40}" if isinstance(writer, str) else "the version"
    raise UserError(
        f"{path}: format {info['format']!r:.40}, but this version of dylora_mlx reads formats 1 to {FORMAT}; "
        f"install {version} that wrote it, or a later one"
    )
