"""Files of others, read with one clear line for what is wrong with them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dylora_mlx.errors import UserError


def sha256(path: Path) -> str:
    """Of a whole file, a block at a time. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError when there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object")
    return found


def inside(folder: Path, name: object) -> Path:
    """A path below a folder, by a name that a file gave. Raises UserError for one that leads out of it."""
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{folder}: '{name}' leads out of the folder")
    return folder / name
