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
from dylora_mlx.data import formatting, skills
from dylora_mlx.data.formatting import Document
from dylora_mlx.system.files import atomic_write, sha256

FORMAT = 1
"""Version of the file layout. It is part of the cache key, so a new version ignores the old files."""
MAX_BYTES = 1 << 30
"""Limit on the total size of the cache folder. The least recently used files are removed first."""
# Options left out of the cache key, because no document depends on them.
_IGNORED_SOURCE_KEYS = ("name", "source", "rank", "alpha")
_IGNORED_DATA_KEYS = ("max_seq_length", "packing_window", "feature_cache_mb")

Splits = dict[str, list[Document]]
"""Documents by split name."""


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
    root, files = skills.locate_source(source), skills.source_files(source)
    if root is None or files is None:
        return None
    try:
        content_hash = getattr(tokenizer, "content_hash", None)
        if content_hash is None:
            return None
        inputs = {
            "format": FORMAT,
            "code": _code_versions(),
            "tokenizer": content_hash,
            "source": _without_keys(asdict(source), _IGNORED_SOURCE_KEYS),
            "data": _without_keys(asdict(data), _IGNORED_DATA_KEYS),
            "seed": seed,
            # A single-file source is relative to itself, so it is named '.', which no file inside a folder can be.
            "files": [(path.relative_to(root).as_posix(), sha256(path)) for path in files],
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
    readers = [sha256(Path(str(module.__file__))) for module in (skills, formatting)]
    return readers + [version(name) for name in ("datasets", "numpy")]


def load(key: str) -> Splits | None:
    """Return the documents cached under a key, or None if there are none or the file is damaged."""
    try:
        path = folder() / f"{key}.npz"
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            splits = {
                split: _split_documents(*(arrays[f"{split}_{part}"] for part in ("tokens", "loss_mask", "ends")))
                for split in skills.SPLITS
            }
    except Exception:  # A damaged file raises many types. The remedy is always the same: tokenize the source again.
        return None
    # The modification time is the time of last use, by which `_prune` orders the files.
    with suppress(OSError):
        os.utime(path)
    return splits


def _split_documents(tokens: np.ndarray, loss_mask: np.ndarray, ends: np.ndarray) -> list[Document]:
    """Split flat arrays into documents.

    Raises ValueError for arrays that cannot be documents: a wrong dtype or length, a negative token id, fewer than
    three tokens (BOS, one token, EOS) in a document, or a BOS that is a target of the loss.

    Args:
        tokens: int32 [N], all documents one after the other.
        loss_mask: bool [N].
        ends: int64 [documents], the end of each document in the other two arrays.
    """
    lengths = np.diff(ends, prepend=0)
    if tokens.dtype != np.int32 or loss_mask.dtype != bool or (lengths < 3).any():
        raise ValueError("not documents")
    if not tokens.shape == loss_mask.shape == (lengths.sum(),):
        raise ValueError("lengths do not agree")
    if tokens.min(initial=0) < 0 or loss_mask[ends - lengths].any():
        raise ValueError("a negative token id, or a BOS that is a target")
    return [Document(*parts) for parts in zip(np.split(tokens, ends[:-1]), np.split(loss_mask, ends[:-1]), strict=True)]


def store(key: str, splits: Splits) -> None:
    """Cache documents under a key. Does nothing if they exceed MAX_BYTES or the file cannot be written."""
    arrays = {}
    for split, documents in splits.items():
        arrays[f"{split}_tokens"] = np.concatenate([document.tokens for document in documents])
        arrays[f"{split}_loss_mask"] = np.concatenate([document.loss_mask for document in documents])
        arrays[f"{split}_ends"] = np.cumsum([len(document.tokens) for document in documents], dtype=np.int64)
    if sum(array.nbytes for array in arrays.values()) > MAX_BYTES:
        return
    with suppress(OSError, RuntimeError):  # Path.home raises RuntimeError if there is no home folder.
        cache_folder = folder()
        cache_folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(cache_folder / f"{key}.npz") as temporary:
            np.savez(temporary, **arrays)
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
