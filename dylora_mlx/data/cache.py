"""Tokenised sources kept between runs: one file of arrays for each, named by the sha256 of all that they follow from."""

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
from dylora_mlx.data import formatting, skills
from dylora_mlx.data.formatting import Document
from dylora_mlx.system.files import atomic_write, sha256

FORMAT = 1
"""Layout of the files."""
MAX_BYTES = 1 << 30
"""Bytes of all files together; those unused for longest go first."""
_LABELS = ("name", "source", "rank", "alpha")  # of a Source, and
_PACKING = ("max_seq_length", "packing_window", "feature_cache_mb")  # of Data: what no document depends on

Splits = dict[str, list[Document]]
"""The documents of each split, by its name."""


def folder() -> Path:
    """Where the files lie, below $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dylora_mlx" / "tokens"


def cache_key(source: Source, data: DataConfig, tokenizer: Any, seed: int) -> str | None:
    """sha256 over a source's files, the options and the seed that its records and splits follow from, the tokenizer's
    `content_hash`, and the code that reads and formats.

    None where one of them cannot be known: a hub data set, a tokenizer without an identity, a file that cannot be read.
    Raises UserError for a source that is not there.
    """
    place, files = skills.locate_source(source), skills.source_files(source)
    if place is None or files is None:
        return None
    try:
        content_hash = getattr(tokenizer, "content_hash", None)
        if content_hash is None:
            return None
        facts = {
            "format": FORMAT,
            "code": _code(),
            "tokenizer": content_hash,
            "source": _without(asdict(source), _LABELS),
            "data": _without(asdict(data), _PACKING),
            "seed": seed,
            # A file by itself is called '.', which no file of a folder can be.
            "files": [(path.relative_to(place).as_posix(), sha256(path)) for path in files],
        }
    except (OSError, PackageNotFoundError):
        return None
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _without(options: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


@cache
def _code() -> list[str]:
    """Our readers as they are, so that a change to them needs no new FORMAT, and what draws the splits."""
    readers = [sha256(Path(str(module.__file__))) for module in (skills, formatting)]
    return readers + [version(name) for name in ("datasets", "numpy")]


def load(name: str) -> Splits | None:
    """The documents kept under a key; None where there are none, or where the file is damaged."""
    try:
        path = folder() / f"{name}.npz"
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {
                split: _cut(*(arrays[f"{split}_{part}"] for part in ("tokens", "loss_mask", "ends")))
                for split in skills.SPLITS
            }
    except Exception:  # damage has many types and one remedy: what follows from the sources is made again
        return None
    with suppress(OSError):
        os.utime(path)
    return found


def _cut(tokens: np.ndarray, loss_mask: np.ndarray, ends: np.ndarray) -> list[Document]:
    """The documents in tokens int32 [N] and loss_mask bool [N], each up to one of the ends int64 [documents]."""
    lengths = np.diff(ends, prepend=0)
    if tokens.dtype != np.int32 or loss_mask.dtype != bool or (lengths < 3).any():
        raise ValueError("not documents")
    if not tokens.shape == loss_mask.shape == (lengths.sum(),):
        raise ValueError("not of these lengths")
    if tokens.min(initial=0) < 0 or loss_mask[ends - lengths].any():
        raise ValueError("no token, or a BOS that is learned")
    return [Document(*parts) for parts in zip(np.split(tokens, ends[:-1]), np.split(loss_mask, ends[:-1]), strict=True)]


def store(name: str, splits: Splits) -> None:
    """Keep documents under a key. Where nothing can be written, nothing is kept."""
    arrays = {}
    for split, documents in splits.items():
        arrays[f"{split}_tokens"] = np.concatenate([document.tokens for document in documents])
        arrays[f"{split}_loss_mask"] = np.concatenate([document.loss_mask for document in documents])
        arrays[f"{split}_ends"] = np.cumsum([len(document.tokens) for document in documents], dtype=np.int64)
    if sum(array.nbytes for array in arrays.values()) > MAX_BYTES:
        return
    with suppress(OSError, RuntimeError):  # RuntimeError: there is no home folder
        home = folder()
        home.mkdir(parents=True, exist_ok=True)
        with atomic_write(home / f"{name}.npz") as temporary:
            np.savez(temporary, **arrays)
        _prune(home)


def _prune(home: Path) -> None:
    """Remove the files unused for longest, and what interrupted runs left, beyond LIMIT."""
    files = [(path.stat(), path) for path in home.iterdir() if path.suffix == ".npz"]
    kept = 0
    for found, path in sorted(files, key=lambda entry: entry[0].st_mtime_ns, reverse=True):
        kept += found.st_size
        if kept > MAX_BYTES:
            path.unlink(missing_ok=True)
