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
        raise UserError(f"{folder}: no run here (no config.yaml)")
    check_format(folder)


def check_format(folder: Path) -> None:
    """Raise UserError if the run.json of `folder` states a format that this version cannot read.

    A missing or damaged run.json is accepted: a run does not need it, and its checkpoints also store their format.
    """
    path = folder / "run.json"
    try:
        info = read_json(path)
    except UserError:
        return
    if not isinstance(info, dict) or is_readable(info.get("format", FORMAT)):
        return
    writer = info.get("dylora_mlx")
    version = f"dylora_mlx {writer:.40}" if isinstance(writer, str) else "the version"
    raise UserError(
        f"{path}: format {info['format']!r:.40}, but this version of dylora_mlx reads formats 1 to {FORMAT}; "
        f"install {version} that wrote it, or a later one"
    )
