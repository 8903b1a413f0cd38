"""Labelled documents: what a person would call different skills, read off any installation.

The rule: a label is the code of one package, or all there is in one language or of one kind of text other than Python; no
two packages do the same task. The packaged skills keep their names, and requests and requests_more are one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dylora_mlx import assets
from dylora_mlx.config import Source
from dylora_mlx.data import skills
from dylora_mlx.errors import UserError
from novelty import cutting

SHARD, SHARDS = 96, 4
"""Documents in a shard, and shards of a label, at most."""
ENOUGH = 4 * SHARD * SHARDS
"""Documents after which no further file is read: a label is drawn from many files, but not from all of a large package."""
FEWEST = 64
"""Documents in a shard, at least; a label has at least two shards."""
SKIPPED = re.compile(r"(^|/)(tests?|testing|conftest.*|test_.*|_?vendor.*|__pycache__|_pb2.*|.*_pb2)(/|$|\.pyi?$)")
PACKAGED = {"requests_more": "requests"}
"""Packaged skills that share another's label."""
PYTHON = {
    **{
        name: (name,)
        for name in ("asyncio", "email", "importlib", "logging", "multiprocessing", "tkinter", "unittest", "xml")
    },
    **{
        name: (name,)
        for name in ("datasets", "fsspec", "huggingface_hub", "jinja2", "jsonargparse", "networkx", "pandas")
    },
    **{name: (name,) for name in ("opentelemetry", "pydantic", "rich", "setuptools", "sympy", "wandb", "yaml")},
    "mlx_lm": ("mlx_lm/models/*.py",),
    "numpy": tuple(f"numpy/{part}/**/*.py" for part in ("lib", "ma", "linalg", "polynomial", "fft", "random", "_core")),
    "plotly": tuple(f"plotly/{part}/**/*.py" for part in ("express", "figure_factory", "io", "matplotlylib")),
    "pygments": ("pygments/lexers/*.py",),
    "transformers": ("transformers/models/*/modeling_*.py",),
}
"""Packages: names of whole ones, or patterns of files in one whose other files are generated or do another task."""
DECLARATIONS = {
    "cpp": ("mlx/include/**/*.h", "pyarrow/include/**/*.h"),
    "c": ("numpy/_core/include/**/*.h",),
    "stubs": ("numpy/**/*.pyi",),
    "cython": ("pyarrow/**/*.pyx", "pyarrow/**/*.pxd", "pandas/**/*.pyx", "pandas/**/*.pxd"),
}
"""Other languages, cut at blank lines."""


class Label(NamedTuple):
    """Documents of one label, texts in a random order; shard i is the slice shards[i]."""

    name: str
    texts: list[str]
    shards: list[slice]


def collect(sources: Iterable[Path]) -> list[Label]:
    """The packaged skills, what is installed, and the sources given; labels with too few documents are left out.

    A document that several labels share stays with the first. Raises UserError for a source that cannot be read, is
    too small, or has the name of another label.
    """
    seen: set[str] = set()
    found, given = {}, {}
    for name, path in _named(sources):
        if name in given:
            raise UserError(f"--sources: {path} and {given[name]} have the same name; rename one of them")
        given[name] = path
    for name, read in {**_packaged(), **_installed()}.items():
        if name in given:
            raise UserError(
                f"--sources: '{name}' is the name of a label that is there anyway; rename the folder or file"
            )
        found[name] = _label(name, read(), seen)
    for name, path in given.items():
        found[name] = _label(name, _of_path(path), seen)
        if found[name] is None:
            raise UserError(f"{path}: too few documents of some length, a label needs {2 * FEWEST} that differ")
    return [label for label in found.values() if label is not None]


def _label(name: str, texts: Iterable[str], seen: set[str]) -> Label | None:
    unique = []
    for text in texts:
        key = cutting.squeezed(text)
        if key not in seen:
            seen.add(key)
            unique.append(text)
    if len(unique) < 2 * FEWEST:
        return None
    rng = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()[:8]))
    shards = min(SHARDS, len(unique) // FEWEST)
    size = min(SHARD, len(unique) // shards)
    texts = [unique[i] for i in rng.permutation(len(unique))[: shards * size]]
    return Label(name, texts, [slice(i * size, (i + 1) * size) for i in range(shards)])


def _packaged() -> dict[str, Callable[[], Iterator[str]]]:
    groups: dict[str, list[str]] = {}
    for name in assets.packaged_skills():
        groups.setdefault(PACKAGED.get(name, name), []).append(name)

    def read(names: list[str]) -> Iterator[str]:
        for name in names:
            yield from _records(assets.SKILLS / name)

    return {name: lambda names=names: read(names) for name, names in groups.items()}


def _installed() -> dict[str, Callable[[], Iterator[str]]]:
    python = {name: lambda places=places: _code(places, cutting.python) for name, places in PYTHON.items()}
    others = {name: lambda places=places: _code(places, cutting.paragraphs) for name, places in DECLARATIONS.items()}
    return {**python, **others, "manual": _manual, "readmes": _readmes, "licences": _licences}


def _code(places: Iterable[str], cut: Callable[[str], Iterator[str]]) -> Iterator[str]:
    """Documents of files in a random order, no more files than are needed."""
    paths, made = [path for place in places for path in files(place)], 0
    for i in np.random.default_rng(0).permutation(len(paths)):
        for text in filter(cutting.readable, cut(paths[i].read_text(encoding="utf-8", errors="replace"))):
            made += 1
            yield text
        if made > ENOUGH:
            return


def files(place: str) -> list[Path]:
    """The files of a module, a package or a pattern such as numpy/**/*.pyi; none where it is not installed."""
    top, _, pattern = place.partition("/")
    spec = importlib.util.find_spec(top)
    if spec is None or not (spec.has_location or spec.submodule_search_locations):
        return []
    if spec.submodule_search_locations is None:
        return [Path(str(spec.origin))]
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    found = [(folder, path) for folder in folders for path in folder.glob(pattern or "**/*.py")]
    return sorted(path for folder, path in found if not SKIPPED.search(path.relative_to(folder).as_posix()))


def _manual() -> Iterator[str]:
    """The help topics of Python's manual."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield from filter(cutting.readable, cutting.paragraphs(topics[name]))


def _readmes() -> Iterator[str]:
    for distribution in _distributions():
        description = distribution.metadata.get_payload()  # type: ignore[attr-defined]
        yield from filter(cutting.readable, cutting.paragraphs(str(description)))


def _licences() -> Iterator[str]:
    for distribution in _distributions():
        for file in distribution.files or []:
            path = Path(str(file.locate()))
            if re.match(r"(LICEN[SC]E|COPYING|NOTICE)", file.name, re.I) and path.is_file():
                text = path.read_text(encoding="utf-8", errors="replace")
                yield from filter(cutting.readable, cutting.notices(text))


def _distributions() -> list[metadata.Distribution]:
    return sorted(metadata.distributions(), key=lambda d: str(d.metadata["Name"]).lower())


def _named(sources: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """Labels of the paths given: a file, a folder with train.jsonl or with text files is one; else every item of it."""
    for source in sources:
        if not source.exists():
            raise UserError(f"{source}: no such file or folder; --sources takes .jsonl files and folders")
        inside = sorted(source.iterdir()) if source.is_dir() and not (source / "train.jsonl").is_file() else []
        sets = [item for item in inside if item.suffix == ".jsonl" or (item.is_dir() and any(item.iterdir()))]
        for item in sets or [source]:
            yield item.stem if item.is_file() else item.name, item


def _of_path(path: Path) -> Iterator[str]:
    if path.suffix == ".jsonl" or any(path.glob("*.jsonl")):
        yield from _records(path)
        return
    for file in skills.source_files(Source(name="given", source=str(path))) or []:
        cut = cutting.python if file.suffix == ".py" else cutting.paragraphs
        yield from filter(cutting.readable, cut(file.read_text(encoding="utf-8", errors="replace")))


def _records(path: Path) -> Iterator[str]:
    """Documents of a .jsonl file, or of all of a folder: a record's texts, one below the other."""
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{file}, line {number}: not JSON ({error.msg})") from error
            values = row.values() if isinstance(row, dict) else []
            text = "\n".join(value for value in values if isinstance(value, str) and value.strip())
            if len(text) >= cutting.SHORTEST // 2:
                yield text[: cutting.LONGEST] + "\n"
