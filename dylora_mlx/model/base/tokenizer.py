"""The base's tokenizer, loaded when it is needed."""

from __future__ import annotations

import hashlib
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dylora_mlx.errors import UserError
from dylora_mlx.system.files import read_json

TOKENIZER_SUFFIXES = {".json", ".jsonl", ".jinja", ".model", ".tiktoken", ".txt", ".py"}
"""Files beside the weights that mlx-lm and transformers read when they load a tokenizer."""


def tokenizer_error(folder: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{folder}: the base could not be loaded ({reason[:200]})")


class Tokenizer:
    """mlx-lm's tokenizer of a folder, loaded when something is first asked of it: one of Gemma's size takes seconds.

    It has every attribute and method of that tokenizer. Its first use raises UserError for one that cannot be loaded
    or has no EOS token.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def content_hash(self) -> str:
        """sha256 over the files that a tokenizer and its chat template may be read from, and the versions of what
        reads them. Raises OSError for a file that cannot be read."""
        digest = hashlib.sha256()
        for name in ("mlx-lm", "transformers", "tokenizers"):
            digest.update(f"{name} {version(name)}\n".encode())
        found = [*self.folder.iterdir(), *self.folder.glob("additional_chat_templates/*")]
        for path in sorted(p for p in found if p.suffix in TOKENIZER_SUFFIXES and p.is_file()):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(self.folder).as_posix()} {content}\n".encode())
        return digest.hexdigest()

    @cached_property
    def wrapped(self) -> Any:
        """mlx-lm's own object."""
        from mlx_lm.utils import load_tokenizer

        try:
            tokenizer = load_tokenizer(self.folder)
        except Exception as error:  # of damaged files: transformers and tokenizers raise many types
            raise tokenizer_error(self.folder, error) from error
        if tokenizer.eos_token_id is None:
            raise UserError(f"{self.folder}: the tokenizer has no EOS token")
        return tokenizer

    @cached_property
    def bos_token_id(self) -> int:
        """What documents begin with: the BOS token, or where there is none, as in Qwen3, what config.json calls so, or EOS:
        such models were taught on documents that it stands between."""
        if self.wrapped.bos_token_id is not None:
            return self.wrapped.bos_token_id
        stated = read_json(self.folder / "config.json").get("bos_token_id")
        return stated if isinstance(stated, int) else self.wrapped.eos_token_id

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what copying and pickling look for
            raise AttributeError(name)
        return getattr(self.wrapped, name)
