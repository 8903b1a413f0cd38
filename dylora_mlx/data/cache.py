"""On-disk cache of tokenized sources.

Each source has one .npz file, named by the sha256 of everything its token ids depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from dylora_mlx.config import DataConfig, Source
from dylora_mlx.data import (
    duplicates,
    files,
    folders,
    formatting,
    layout,
    messages,
    readers,
    records,
    rendering,
    skills,
    split_files,
    tokenized,
)
from dylora_mlx.data.tokenized import TokenizedSource
from dylora_mlx.system.files import atomic_write, sha256

FORMAT = 2
"""Version of the file layout. It is part of the cache key, so a new version ignores the old files."""
MAX_BYTES = 1 << 30
"""Limit on the total size of the cache folder. The least recently used files are removed first."""
# Options left out of the cache key, because no document depends on them. Of the chat template its text counts instead.
_IGNORED_SOURCE_KEYS = ("name", "source", "rank", "alpha")
_IGNORED_DATA_KEYS = ("max_seq_length", "packing_window", "feature_cache_mb", "chat_template")


def folder() -> Path:
    """Return the cache folder, below $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dylora_mlx" / "tokens"


def cache_key(source: Source, data: DataConfig, tokenizer: Any, seed: int) -> str | None:
    """Return the cache key of a source, or None if its documents cannot be cached.

    The key is a sha256 over everything the documents depend on: the source's files, the options and the seed that
    determine its records and splits, the tokenizer's `content_hash`, and the code that reads and formats records.

    The result is None for a hub data set, for a tokenizer without a `content_hash`, and for a file or package version
    that cannot be read. Raises UserError for a source that does not exist.
    """
    root, paths = skills.locate_source(source), skills.source_files(source)
    if root is None or paths is None:
        return None
    try:
        content_hash = getattr(tokenizer, "content_hash", None)
        if content_hash is None:
            return None
        inputs = {
            "format": FORMAT,
            "code": _code_versions(),
            "tokenizer": content_hash,
            "chat_template": rendering.set_template(tokenizer),
            "source": _without_keys(asdict(source), _IGNORED_SOURCE_KEYS),
            "data": _without_keys(asdict(data), _IGNORED_DATA_KEYS),
            "seed": seed,
            # A single-file source is relative to itself, so it is named '.', which no file inside a folder can be.
            "files": [(path.relative_to(root).as_posix(), sha256(path)) for path in paths],
        }
    except (OSError, PackageNotFoundError):
        return None
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _without_keys(options: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


@cache
def _code_versions() -> list[str]:
    """Return hashes of the modules that read and format, and the versions of the packages that draw the splits. A
    change to the readers therefore needs no new FORMAT."""
    modules = (
        duplicates, files, folders, formatting, layout, messages, readers, records, rendering, skills, split_files, tokenized
    )  # fmt: skip
    hashes = [sha256(Path(str(module.__file__))) for module in modules]
    hashes.append(sha256(Path(__file__).with_name("tables.py")))  # imported only to read what `datasets` reads
    return hashes + [version(name) for name in ("datasets", "numpy", "pathspec")]


def load(key: str) -> TokenizedSource | None:
    """Return the documents cached under a key, or None if there are none or the file is damaged."""
    try:
        path = folder() / f"{key}.npz"
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            source = TokenizedSource.from_arrays(arrays)
    except Exception:  # A damaged file raises many types. The remedy is always the same: tokenize the source again.
        return None
    # The modification time is the time of last use, by which `_prune` orders the files.
    with suppress(OSError):
        os.utime(path)
    return source


def store(key: str, source: TokenizedSource) -> None:
    """Cache documents under a key. Does nothing if they exceed MAX_BYTES or the file cannot be written."""
    arrays = source.to_arrays()
    if sum(array.nbytes for array in arrays.values()) > MAX_BYTES:
        return
    with suppress(OSError, RuntimeError):  # Path.home raises RuntimeError if there is no home folder.
        cache_folder = folder()
        cache_folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(cache_folder / f"{key}.npz") as temporary:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]
        _prune(cache_folder)


def _prune(cache_folder: Path) -> None:
    """Remove the least recently used files beyond MAX_BYTES.

    The temporary files of interrupted runs also end in .npz, so they age out in the same way.
    """
    files = [(path.stat(), path) for path in cache_folder.iterdir() if path.suffix == ".npz"]
    total_bytes = 0
    for stat, path in sorted(files, key=lambda entry: entry[0].st_mtime_ns, reverse=True):
        total_bytes += stat.st_size
        if total_bytes > MAX_BYTES:
            path.unlink(missing_ok=True)
