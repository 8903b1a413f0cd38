"""Migrations: the content of a checkpoint of an earlier format, as that of the current one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dylora_mlx.errors import UserError
from dylora_mlx.growth.library import entry_file, part_of_array

ENTRY_ARRAY = re.compile(r"(\d+)\.(\w+)")
"""Name of an array in the library.safetensors of format 1: the entry's number and the array."""


def matrix_file(row: int) -> str:
    """Return the name of the file that holds a row of the loss matrix: 0 is the base, i the evaluation after skill i."""
    return f"matrix/row_{row}.json"


def from_format_1(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint of format 1 as that of format 2. Raises UserError for invalid content.

    Format 1 has all entries in library.safetensors, and the loss matrix in trainer.json. A folder without these, such as
    an archive of removed experts, is as it was.
    """
    migrated = {name: value for name, value in content.items() if name != "library.safetensors"}
    for name, array in content.get("library.safetensors", {}).items():
        match = ENTRY_ARRAY.fullmatch(name)
        if match is None:
            raise UserError(
                f"{folder / 'library.safetensors'}: the library is damaged at '{name}'; use an earlier checkpoint"
            )
        file = entry_file(int(match[1]), part_of_array(match[2]))
        migrated.setdefault(file, {})[match[2]] = array
    if "trainer.json" in content:
        trainer = dict(content["trainer.json"])
        matrix = trainer.pop("matrix", None)
        if not isinstance(matrix, list):
            raise UserError(f"{folder / 'trainer.json'}: damaged, it has no loss matrix; use an earlier checkpoint")
        migrated |= {"trainer.json": trainer} | {matrix_file(row): losses for row, losses in enumerate(matrix)}
    return migrated
