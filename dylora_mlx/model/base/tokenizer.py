"""The base's tokenizer, loaded on first use."""

from __future__ import annotations

import hashlib
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dylora_mlx.errors import UserError
from dylora_mlx.system.files import read_json

TOKENIZER_SUFFIXES = {".json", ".jsonl", ".jinja", ".model", ".tiktoken", ".txt", ".py"}
"""Suffixes of files beside the weights that mlx-lm and transformers read when they load a tokenizer."""


def tokenizer_error(folder: Path, error: Exception) -> UserError:
    """Return the UserError for a base or a tokenizer that cannot be loaded from this folder."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{folder}: the base could not be loaded ({reason[:200]})")


class Tokenizer:
    """Lazy wrapper of mlx-lm's tokenizer, loaded at the first attribute access: one of Gemma's size takes seconds.

    It has every attribute and method of the wrapped tokenizer. The first use raises UserError if the tokenizer cannot
    be loaded or has no EOS token.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def content_hash(self) -> str:
        """sha256 over the files of the tokenizer and its chat template, and the versions of their loaders.

        Raises OSError for a file that cannot be read.
        """
        digest = hashlib.sha256()
        for name in ("mlx-lm", "transformers", "tokenizers"):
            digest.update(f"{name} {version(name)}\n".encode())
        candidates = [*self.folder.iterdir(), *self.folder.glob("additional_chat_templates/*")]
        for path in sorted(p for p in candidates if p.suffix in TOKENIZER_SUFFIXES and p.is_file()):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(self.folder).as_posix()} {content}\n".encode())
        return digest.hexdigest()

    @cached_property
    def wrapped(self) -> Any:
        """mlx-lm's tokenizer object."""
        from mlx_lm.utils import load_tokenizer

        try:
            tokenizer = load_tokenizer(self.folder)
        except Exception as error:  # transformers and tokenizers raise many types for damaged files
            raise tokenizer_error(self.folder, error) from error
        if tokenizer.eos_token_id is None:
            raise UserError(f"{self.folder}: the tokenizer has no EOS token")
        return tokenizer

    @cached_property
    def bos_token_id(self) -> int:
        """The token that documents begin with.

        This is the tokenizer's BOS token. If it has none, as in Qwen3, it is the bos_token_id of config.json, or else
        EOS: these models were pretrained on documents separated by that token.
        """
        if self.wrapped.bos_token_id is not None:
            return self.wrapped.bos_token_id
        config_id = read_json(self.folder / "config.json").get("bos_token_id")
        return config_id if isinstance(config_id, int) else self.wrapped.eos_token_id

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # names that copy and pickle look for
            raise AttributeError(name)
        return getattr(self.wrapped, name)
