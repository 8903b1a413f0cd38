"""The format of run folders, checked before anything in one is read.

A run folder says its format in run.json, a checkpoint in its MANIFEST.json. Format 1 is what version 0.1 writes. Every
later version reads it: whoever changes the layout, a file's name or a key raises `FORMAT` and adds the migration, and
tests/run/test_format.py opens the stored folders of every earlier format.
"""

from __future__ import annotations

from pathlib import Path

from dylora_mlx.errors import UserError
from dylora_mlx.system.files import read_json

FORMAT = 1


def check_run_folder(folder: Path) -> None:
    """Raises UserError unless `folder` is a run folder of a format that this version reads."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: no run here (no config.yaml)")
    check_format(folder)


def check_format(folder: Path) -> None:
    """Raises UserError if the run.json of `folder` says a format that this version does not read.

    A run.json that is missing or damaged passes: a run does without it, and its checkpoints say their format too.
    """
    path = folder / "run.json"
    try:
        info = read_json(path)
    except UserError:
        return
    if not isinstance(info, dict) or info.get("format", FORMAT) == FORMAT:
        return
    writer = info.get("dylora_mlx")
    version = f"dylora_mlx {writer:.40}" if isinstance(writer, str) else "the version"
    raise UserError(
        f"{path}: format {info['format']!r:.40}, but this version of dylora_mlx reads format {FORMAT}; "
        f"install {version} that wrote it, or a later one"
    )
