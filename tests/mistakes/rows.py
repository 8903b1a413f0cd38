"""What a row of the tables of mistakes is, and the ways to damage a copy of a run or of a data file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from dylora_mlx.system.files import sha256

Damage = Callable[[Path], Any]
"""Changes the folder of a row, in which the run is `run`, the exported mixture `mixture`, and data lie beside them."""
FINAL = "run/checkpoints/final"
EXPERT = f"{FINAL}/experts/expert_1/adapters.safetensors"


class Mistake(NamedTuple):
    """One bad input. argv: the words as a shell reads them, from the row's folder; said: what the line must contain;
    damage: what is done to a copy of the folder before; locked: another process holds the run; root: whether root meets
    it too, who may read and write everything; stdin: what comes in through the pipe."""

    command: str
    argv: str
    said: str | tuple[str, ...]
    damage: Damage | None = None
    locked: bool = False
    root: bool = True
    stdin: str = ""


def each(*damages: Damage) -> Damage:
    """Several damages, one after another."""

    def damage(place: Path) -> None:
        for one in damages:
            one(place)

    return damage


def gone(name: str) -> Damage:
    def damage(place: Path) -> None:
        path = place / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return damage


def cut(name: str) -> Damage:
    """Half of a file is left."""
    return lambda place: (place / name).write_bytes((place / name).read_bytes()[: (place / name).stat().st_size // 2])


def put(name: str, content: str | bytes) -> Damage:
    """A file with this content, in the place of whatever is there."""

    def damage(place: Path) -> None:
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def utf16(name: str) -> Damage:
    return lambda place: (place / name).write_bytes((place / name).read_text().encode("utf-16"))


def flip(name: str, at: int) -> Damage:
    """Eight bytes of a file turned over."""

    def damage(place: Path) -> None:
        found = bytearray((place / name).read_bytes())
        found[at : at + 8] = bytes(255 - byte for byte in found[at : at + 8])
        (place / name).write_bytes(bytes(found))

    return damage


def folder(name: str) -> Damage:
    """An empty folder in the place of whatever is there."""
    return lambda place: ((place / name).exists() and gone(name)(place), (place / name).mkdir(parents=True))


def astray(name: str) -> Damage:
    """A link that leads nowhere, in the place of a file or folder."""
    return lambda place: (gone(name)(place), (place / name).symlink_to("/nosuch/place"))


def sealed(name: str, mode: int) -> Damage:
    """Other permissions. Root ignores them."""
    return lambda place: (place / name).chmod(mode)


def changed(name: str, change: Callable[[Any], Any]) -> Damage:
    """A JSON file changed, its hash put right in the manifest beside or above it, if there is one."""

    def damage(place: Path) -> None:
        found = json.loads((place / name).read_text())
        replaced = change(found)
        (place / name).write_text(json.dumps(found if replaced is None else replaced))
        sign(place / name)

    return damage


def having(**values: Any) -> Callable[[dict], None]:
    """Of a JSON object, for `changed`: these values instead."""
    return lambda found: found.update(values)


def weights(name: str, change: Callable[[dict[str, mx.array]], Any]) -> Damage:
    """Arrays of a safetensors file changed, its hash put right."""

    def damage(place: Path) -> None:
        found: Any = mx.load(str(place / name))
        mx.eval(found)
        change(found)
        (place / name).unlink()
        mx.save_safetensors(str(place / name), found)
        sign(place / name)

    return damage


def every(value: Callable[[mx.array], mx.array]) -> Callable[[dict[str, mx.array]], None]:
    """Of arrays, for `weights`: each one replaced."""
    return lambda found: found.update({name: value(array) for name, array in found.items()})


def absurd(name: str) -> Damage:
    """A safetensors header that asks for exabytes, its hash put right."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**31 - 1, 2**30], "data_offsets": [0, 2**63]}}).encode()
    content = len(header).to_bytes(8, "little") + header

    def damage(place: Path) -> None:
        (place / name).write_bytes(content)
        sign(place / name)

    return damage


def sign(path: Path) -> None:
    """The hash of a file as it is now, in the manifest of the checkpoint or the export that it belongs to."""
    for parent in path.parents:
        for manifest in (parent / "MANIFEST.json", parent / "dylora.json"):
            if manifest.is_file() and manifest != path:
                found = json.loads(manifest.read_text())
                found["sha256"][path.relative_to(parent).as_posix()] = sha256(path)
                manifest.write_text(json.dumps(found))
                return


unfinished = gone(FINAL)
"""As if the run had been stopped before its end."""


def no_steps(place: Path) -> None:
    """No checkpoint but the final one."""
    for path in (place / "run/checkpoints").glob("step-*"):
        shutil.rmtree(path)


def at_newest(damage: Callable[[str], Damage]) -> Damage:
    """The run stopped with one checkpoint, and that one damaged: `damage` gets its name."""

    def done(place: Path) -> None:
        unfinished(place)
        *earlier, newest = sorted((place / "run/checkpoints").glob("step-*"))
        for path in earlier:
            shutil.rmtree(path)
        damage(newest.relative_to(place).as_posix())(place)

    return done
