"""Labelled documents, with labels that a person would call different skills, from the software installed here.

A label is the code of one Python package, or all text of another language or kind. No two packages do the same task.
The packaged skills keep their names; requests and requests_more are one label.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
"""Maximum number of documents per shard, and of shards per label."""
ENOUGH = 4 * SHARD * SHARDS
"""Documents after which no further file is read: many files suffice for a label, even of a large package."""
FEWEST = 64
"""Minimum number of documents per shard; a label has at least two shards."""
SKIPPED = re.compile(r"(^|/)(tests?|testing|conftest.*|test_.*|_?vendor.*|__pycache__|_pb2.*|.*_pb2)(/|$|\.pyi?$)")
PACKAGED = {"requests_more": "requests"}
"""Packaged skills that share another's label, with that label."""
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
"""Labels of Python packages. An entry names a whole package, or patterns of files if the other files of the package are
generated or do another task."""
DECLARATIONS = {
    "cpp": ("mlx/include/**/*.h", "pyarrow/include/**/*.h"),
    "c": ("numpy/_core/include/**/*.h",),
    "stubs": ("numpy/**/*.pyi",),
    "cython": ("pyarrow/**/*.pyx", "pyarrow/**/*.pxd", "pandas/**/*.pyx", "pandas/**/*.pxd"),
}
"""Labels of other languages, with patterns of files, which are cut at blank lines."""


class Label(NamedTuple):
    """Documents of one label."""

    name: str
    texts: list[str]
    """Documents in random order."""
    shards: list[slice]
    """Slices of `texts`, one per shard."""
    places: Sequence[int] = ()
    """Place of each document of `texts` in the order of reading."""


def collect(sources: Iterable[Path], shared: Mapping[str, str] = PACKAGED) -> list[Label]:
    """Return the labels of the packaged skills, of installed software, and of the given sources.

    Packaged and installed labels with too few documents are left out. A document that several labels share stays with
    the first. `shared` maps packaged skills to the label that they share. Raises UserError for a source that cannot be
    read, is too small, or has the name of another label.
    """
    seen: set[str] = set()
    labels, user_sources = {}, {}
    for name, path in _named_sources(sources):
        if name in user_sources:
            raise UserError(f"--sources: {path} and {user_sources[name]} have the same name; rename one of them")
        user_sources[name] = path
    for name, read in {**_packaged(shared), **_installed()}.items():
        if name in user_sources:
            raise UserError(
                f"--sources: '{name}' is the name of a label that exists without it; rename the folder or file"
            )
        labels[name] = _label(name, read(), seen)
    for name, path in user_sources.items():
        labels[name] = _label(name, _read_path(path), seen)
        if labels[name] is None:
            raise UserError(
                f"{path}: too few documents; a label needs {2 * FEWEST} different ones that are not too short"
            )
    return [label for label in labels.values() if label is not None]


def by_word(path: Path, words: Sequence[str], fewest: int) -> list[Label]:
    """Return one label for each word: the documents of a .jsonl file or folder whose first line has it as a whole word.

    A document with several of the words counts for the first. Words with fewer than `fewest` documents are left out.
    """
    texts = {word: list[str]() for word in words}
    # A # or + is part of a word here: C# and C++ are no mention of C.
    patterns = {word: re.compile(rf"(?<![\w#+]){re.escape(word)}(?![\w#+])", re.I) for word in words}
    for text in _records(path):
        line = text.partition("\n")[0]
        named = next((word for word, pattern in patterns.items() if pattern.search(line)), None)
        if named:
            texts[named].append(text)
    labels = (_label(f"{path.stem}/{word}", texts[word], set(), fewest) for word in words)
    return [label for label in labels if label is not None]


def _label(name: str, texts: Iterable[str], seen: set[str], fewest: int = 2 * FEWEST) -> Label | None:
    """Return a label of the texts that are not in `seen`, which is updated; None if there are fewer than `fewest`."""
    unique = []
    for text in texts:
        key = cutting.squeezed(text)
        if key not in seen:
            seen.add(key)
            unique.append(text)
    if len(unique) < fewest:
        return None
    rng = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()[:8]))
    shards = max(2, min(SHARDS, len(unique) // FEWEST))
    size = min(SHARD, len(unique) // shards)
    places = rng.permutation(len(unique))[: shards * size].tolist()
    return Label(name, [unique[i] for i in places], [slice(i * size, (i + 1) * size) for i in range(shards)], places)


def _packaged(shared: Mapping[str, str]) -> dict[str, Callable[[], Iterator[str]]]:
    groups: dict[str, list[str]] = {}
    for name in assets.packaged_skills():
        groups.setdefault(shared.get(name, name), []).append(name)

    def read(names: list[str]) -> Iterator[str]:
        for name in names:
            yield from _records(assets.SKILLS / name)

    return {name: lambda names=names: read(names) for name, names in groups.items()}


def _installed() -> dict[str, Callable[[], Iterator[str]]]:
    python = {name: lambda patterns=patterns: _code(patterns, cutting.python) for name, patterns in PYTHON.items()}
    others = {
        name: lambda patterns=patterns: _code(patterns, cutting.paragraphs) for name, patterns in DECLARATIONS.items()
    }
    return {**python, **others, "manual": _manual, "readmes": _readmes, "licences": _licences}


def _code(patterns: Iterable[str], cut: Callable[[str], Iterator[str]]) -> Iterator[str]:
    """Yield documents of files in random order, until there are enough."""
    paths, num_documents = [path for pattern in patterns for path in files(pattern)], 0
    for i in np.random.default_rng(0).permutation(len(paths)):
        for text in filter(cutting.readable, cut(paths[i].read_text(encoding="utf-8", errors="replace"))):
            num_documents += 1
            yield text
        if num_documents > ENOUGH:
            return


def files(place: str) -> list[Path]:
    """Return the files of a module, of a package or of a pattern, for example numpy/**/*.pyi; none if not installed."""
    module, _, pattern = place.partition("/")
    spec = importlib.util.find_spec(module)
    if spec is None or not (spec.has_location or spec.submodule_search_locations):
        return []
    if spec.submodule_search_locations is None:
        return [Path(str(spec.origin))]
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    matches = [(folder, path) for folder in folders for path in folder.glob(pattern or "**/*.py")]
    return sorted(path for folder, path in matches if not SKIPPED.search(path.relative_to(folder).as_posix()))


def _manual() -> Iterator[str]:
    """Yield documents of the help topics in Python's manual."""
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


def _named_sources(sources: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """Yield the name and the path of each label in the given paths.

    A file is one label, and so is a folder with a train.jsonl or with text files only. A folder with other .jsonl files
    or with folders has one label for each of these.
    """
    for source in sources:
        if not source.exists():
            raise UserError(f"{source}: no such file or folder; --sources takes .jsonl files and folders")
        items = sorted(source.iterdir()) if source.is_dir() and not (source / "train.jsonl").is_file() else []
        datasets = [item for item in items if item.suffix == ".jsonl" or (item.is_dir() and any(item.iterdir()))]
        for item in datasets or [source]:
            yield item.stem if item.is_file() else item.name, item


def _read_path(path: Path) -> Iterator[str]:
    if path.suffix == ".jsonl" or any(path.glob("*.jsonl")):
        yield from _records(path)
        return
    for file in skills.source_files(Source(name="given", source=str(path))) or []:
        cut = cutting.python if file.suffix == ".py" else cutting.paragraphs
        yield from filter(cutting.readable, cut(file.read_text(encoding="utf-8", errors="replace")))


def _records(path: Path) -> Iterator[str]:
    """Yield the documents of a .jsonl file or of all those in a folder: the joined string values of each record."""
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
