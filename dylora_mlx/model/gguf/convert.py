"""Write a GGUF file as a Hugging Face folder, and cache converted folders."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dylora_mlx.errors import UserError
from dylora_mlx.model.gguf.config import model_config
from dylora_mlx.model.gguf.reader import GGUFFile
from dylora_mlx.model.gguf.tensors import require_package, type_counts
from dylora_mlx.model.gguf.tokenizer import read_tokenizer
from dylora_mlx.model.gguf.weights import DType, exact_dtype, weights, write_weights
from dylora_mlx.system import console
from dylora_mlx.system.files import atomic_folder, read_json, sha256, write_error, write_json

FORMAT = 1
"""Version of the conversion. It is part of the cache folder's name, so a new version converts every file again."""
ORIGIN = "gguf.json"
"""Name of the JSON file that records the GGUF file, its tensor types and the conversion format of a folder."""


def convert(path: Path, out: Path, dtype: DType | None = None) -> None:
    """Write the model and the tokenizer of a GGUF file as a folder that both mlx-lm and transformers load.

    Args:
        path: the file.
        out: the folder to write; must not exist. It is complete or absent afterwards.
        dtype: dtype of the weights; None for the narrowest one that holds the file's values exactly, which is float32
            for a quantised file.

    Raises UserError for a file that cannot be converted and a folder that cannot be written, Failure when the disk is full.
    """
    require_package()
    file = GGUFFile(path)
    config = model_config(file)
    types = type_counts(file)
    model_weights = weights(file, config)
    tokenizer, tokenizer_config, ids = read_tokenizer(file, config["vocab_size"])
    dtype = dtype or exact_dtype(file, model_weights)
    # A model ends at one token in config.json, at all of them in generation_config.json, as in published folders.
    ends = ids.get("eos_token_id", [])
    config |= {**ids, "eos_token_id": ends[0] if ends else None, "dtype": dtype, "torch_dtype": dtype}
    generation = {**ids, "eos_token_id": ends if len(ends) > 1 else config["eos_token_id"]}
    try:
        with atomic_folder(out) as folder:
            _write_json(folder / "config.json", config)
            _write_json(folder / "generation_config.json", generation)
            _write_json(folder / "tokenizer_config.json", tokenizer_config)
            tokenizer.save(str(folder / "tokenizer.json"))
            _write_json(folder / ORIGIN, {"file": path.name, "types": types, "format": FORMAT})
            write_weights(folder / "model.safetensors", file, model_weights, dtype)
    except OSError as error:
        raise write_error(out, error, "choose another folder") from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    known = {name: entry for name, entry in value.items() if entry is not None}
    path.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def cache_folder() -> Path:
    """Return the folder of converted bases, below $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dylora_mlx" / "bases"


def cached_folder(path: Path) -> Path:
    """Return the folder of a GGUF file, converted on the first use.

    The folder's name has the hash of the file's content, so a file that changes is converted again. Processes that need
    the same file wait for the one that converts it.

    Raises UserError as `convert` does.
    """
    cache = cache_folder()
    try:
        digest = hashlib.sha256(f"{FORMAT} {_content_hash(path, cache / 'hashes.json')}".encode()).hexdigest()[:16]
        stem = re.sub(r"[^\w.-]+", "-", path.stem if path.suffix == ".gguf" else path.name)[:60].strip("-.") or "model"
        folder = cache / f"{stem}-{digest}"
        if not folder.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            with _lock(cache):
                if not folder.is_dir():
                    convert(path, folder)
                    console.info(f"{path}: converted, and kept in {folder} for the next time")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read, or kept in {cache} ({error.strerror}); set XDG_CACHE_HOME to a folder that can be "
            "written, or convert the file with dylora convert-base"
        ) from error
    return folder


def _content_hash(path: Path, memory: Path) -> str:
    """Return the sha256 of a file. A file of gigabytes is read only once: size and time of change are remembered with it.

    Raises OSError for a file that cannot be read.
    """
    stat = path.stat()
    key, state = str(path.resolve()), [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    known: dict[str, Any] = {}
    with suppress(UserError):
        known = read_json(memory)
    entry = known.get(key)
    if isinstance(entry, list) and entry[:-1] == state and isinstance(entry[-1], str):
        return entry[-1]
    digest = sha256(path)
    with suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, {**known, key: [*state, digest]})
    return digest


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Wait until no other process holds the lock of a folder, and hold it within the block."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
