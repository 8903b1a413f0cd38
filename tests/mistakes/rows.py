"""The type of the rows in the tables of mistakes, and functions that damage a copy of a run or of a data file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import yaml

from dylora_mlx.system.files import sha256

Damage = Callable[[Path], Any]
"""Modifies the folder of a row, which has the run `run`, the exported mixture `mixture`, and data files."""
FINAL = "run/checkpoints/final"
EXPERT = f"{FINAL}/experts/expert_1/adapters.safetensors"


class Mistake(NamedTuple):
    """One bad input of a command."""

    command: str
    argv: str
    """The arguments as a shell command line, run in the row's folder."""
    message: str | tuple[str, ...]
    """Texts that the error line must contain."""
    damage: Damage | None = None
    """Applied to a copy of the folder first."""
    locked: bool = False
    """Whether another process holds the lock of the run."""
    root: bool = True
    """Whether the mistake also fails for root, who may read and write everything."""
    stdin: str = ""


def chain(*damages: Damage) -> Damage:
    """Apply several damages, one after another."""

    def damage(place: Path) -> None:
        for step in damages:
            step(place)

    return damage


def delete(name: str) -> Damage:
    """Delete a file or folder."""

    def damage(place: Path) -> None:
        path = place / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return damage


def truncate(name: str) -> Damage:
    """Truncate a file to half its size."""
    return lambda place: (place / name).write_bytes((place / name).read_bytes()[: (place / name).stat().st_size // 2])


def write(name: str, content: str | bytes) -> Damage:
    """Write a file with this content."""

    def damage(place: Path) -> None:
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def utf16(name: str) -> Damage:
    """Convert a text file to UTF-16."""
    return lambda place: (place / name).write_bytes((place / name).read_text().encode("utf-16"))


def flip(name: str, start: int) -> Damage:
    """Invert eight bytes of a file."""

    def damage(place: Path) -> None:
        content = bytearray((place / name).read_bytes())
        content[start : start + 8] = bytes(255 - byte for byte in content[start : start + 8])
        (place / name).write_bytes(bytes(content))

    return damage


def mkdir(name: str) -> Damage:
    """Create an empty folder, in place of a file or folder of that name."""
    return lambda place: ((place / name).exists() and delete(name)(place), (place / name).mkdir(parents=True))


def dangling(name: str) -> Damage:
    """Replace a file or folder by a dangling symbolic link."""
    return lambda place: (delete(name)(place), (place / name).symlink_to("/nosuch/place"))


def chmod(name: str, mode: int) -> Damage:
    """Change the permissions of a file or folder. Root ignores them."""
    return lambda place: (place / name).chmod(mode)


def edit(name: str, change: Callable[[Any], Any]) -> Damage:
    """Edit a JSON file, and update its hash in the manifest of its checkpoint or export, if there is one.

    `change` modifies the parsed content, or returns a replacement.
    """

    def damage(place: Path) -> None:
        content = json.loads((place / name).read_text())
        replacement = change(content)
        (place / name).write_text(json.dumps(content if replacement is None else replacement))
        update_hash(place / name)

    return damage


def setting(**values: Any) -> Callable[[dict], None]:
    """Return a change for `edit` that sets these keys of a JSON object."""
    return lambda content: content.update(values)


def resource(skill: str, source: str) -> Damage:
    """Name another source of a skill in the run's config.yaml; a path inside the row's folder, or an absolute one."""

    def damage(place: Path) -> None:
        path = place / "run/config.yaml"
        config = yaml.safe_load(path.read_text())
        for entry in config["skills"]:
            if entry["name"] == skill:
                entry["source"] = str(place / source)
        path.write_text(yaml.safe_dump(config))

    return damage


def edit_arrays(name: str, change: Callable[[dict[str, mx.array]], Any]) -> Damage:
    """Edit the arrays of a safetensors file in place, and update its hash."""

    def damage(place: Path) -> None:
        arrays: Any = mx.load(str(place / name))
        mx.eval(arrays)
        change(arrays)
        (place / name).unlink()
        mx.save_safetensors(str(place / name), arrays)
        update_hash(place / name)

    return damage


def every(transform: Callable[[mx.array], mx.array]) -> Callable[[dict[str, mx.array]], None]:
    """Return a change for `edit_arrays` that replaces every array."""
    return lambda arrays: arrays.update({name: transform(array) for name, array in arrays.items()})


def huge(name: str) -> Damage:
    """Write a safetensors header that describes exabytes of data, and update its hash."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**31 - 1, 2**30], "data_offsets": [0, 2**63]}}).encode()
    content = len(header).to_bytes(8, "little") + header

    def damage(place: Path) -> None:
        (place / name).write_bytes(content)
        update_hash(place / name)

    return damage


def update_hash(path: Path) -> None:
    """Update the hash of a file in the manifest of the checkpoint or export that it belongs to, if there is one."""
    for parent in path.parents:
        for manifest in (parent / "MANIFEST.json", parent / "dylora.json"):
            if manifest.is_file() and manifest != path:
                content = json.loads(manifest.read_text())
                content["sha256"][path.relative_to(parent).as_posix()] = sha256(path)
                manifest.write_text(json.dumps(content))
                return


unfinished = delete(FINAL)
"""Delete the final checkpoint, as if the run had been stopped before its end."""


def no_steps(place: Path) -> None:
    """Delete all checkpoints except the final one."""
    for path in (place / "run/checkpoints").glob("step-*"):
        shutil.rmtree(path)


def at_newest(damage: Callable[[str], Damage]) -> Damage:
    """Make the run unfinished, with its newest checkpoint only, and damage that one.

    `damage` takes the path of the checkpoint relative to the folder.
    """

    def damage_newest(place: Path) -> None:
        unfinished(place)
        *earlier, newest = sorted((place / "run/checkpoints").glob("step-*"))
        for path in earlier:
            shutil.rmtree(path)
        damage(newest.relative_to(place).as_posix())(place)

    return damage_newest
