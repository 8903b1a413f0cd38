"""The base's tokenizer, loaded on first use."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dylora_mlx.errors import UserError
from dylora_mlx.system.files import read_json

TOKENIZER_SUFFIXES = {".json", ".jsonl", ".jinja", ".model", ".tiktoken", ".txt", ".py"}
"""Suffixes of files beside the weights that mlx-lm and transformers read when they load a tokenizer."""

PLACEHOLDERS = {"<image_soft_token>"}
"""Tokens that text models of multimodal families keep in their vocabulary without an embedding."""

PLAIN_TEMPLATE = "{#- dylora_mlx: the text as it is -#}"
"""Beginning of the chat template that a fused model of a base without one carries, for programs that know only chats."""


def tokenizer_error(folder: Path, error: Exception) -> UserError:
    """Return the UserError for a base or a tokenizer that cannot be loaded from this folder."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{folder}: the base could not be loaded ({reason[:200]})")


class RenderingTokenizer:
    """A Hugging Face tokenizer behind the interface that `data.rendering` needs.

    Args:
        huggingface: the tokenizer.
        chat_template: Jinja text in place of the tokenizer's own template.
        eos_token_ids: ids that end a text; empty for the tokenizer's EOS alone.
    """

    def __init__(self, huggingface: Any, chat_template: str | None = None, eos_token_ids: Sequence[int] = ()) -> None:
        self._huggingface, self._eos_token_ids = huggingface, tuple(eos_token_ids)
        self.template_override = chat_template
        """Jinja text in place of the tokenizer's own chat template; None for its own."""

    @property
    def huggingface(self) -> Any:
        """The tokenizer of transformers."""
        return self._huggingface

    @property
    def bos_token_id(self) -> int:
        """The token that documents begin with; EOS for a tokenizer without BOS."""
        bos = self.huggingface.bos_token_id
        return self.huggingface.eos_token_id if bos is None else bos

    @property
    def eos_token_id(self) -> int:
        """The token that ends a document."""
        return self.huggingface.eos_token_id

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """Ids that end a text, the tokenizer's EOS first."""
        return tuple(dict.fromkeys([self.eos_token_id, *self._eos_token_ids]))

    @property
    def num_embeddings(self) -> int | None:
        """Rows of the base's embedding; None if unknown."""
        return None

    @property
    def chat_template(self) -> str | None:
        """The chat template, as Jinja text: the one that was set, else the tokenizer's own; None for none."""
        return self.template_override or self.own_template

    @property
    def own_template(self) -> str | None:
        """The chat template that came with the tokenizer; of several named ones the default. A plain one counts as none."""
        template = self.huggingface.chat_template
        if isinstance(template, dict):
            template = template.get("default") or next(iter(template.values()), None)
        return None if template and template.startswith(PLAIN_TEMPLATE) else template

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each special token, such as <eos>."""
        return [str(token) for token in self.huggingface.convert_ids_to_tokens(list(ids)) if token]

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text, without BOS and EOS."""
        return self.huggingface.encode(text, add_special_tokens=False)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]] | None:
        """Return the ids of a text and the span of characters of each; None for a slow tokenizer, which has no offsets."""
        if not self.huggingface.is_fast:
            return None
        encoding = self.huggingface(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoding["input_ids"], [tuple(span) for span in encoding["offset_mapping"]]

    def apply_template(
        self, template: str, messages: list[dict[str, Any]], tools: list[Any] | None, add_generation_prompt: bool
    ) -> str:
        """Return the text of messages under a chat template. Raises what the template raises."""
        return self.huggingface.apply_chat_template(
            messages, tools=tools, chat_template=template, add_generation_prompt=add_generation_prompt, tokenize=False
        )


class Tokenizer(RenderingTokenizer):
    """Lazy wrapper of mlx-lm's tokenizer, loaded at the first attribute access: one of Gemma's size takes seconds.

    It has every attribute and method of the wrapped tokenizer. The first use raises UserError if the tokenizer cannot
    be loaded or has no EOS token.
    """

    def __init__(self, folder: Path, chat_template: str | None = None) -> None:
        super().__init__(None, chat_template)
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
        """mlx-lm's tokenizer object, which stops at `eos_token_ids`."""
        from mlx_lm.utils import load_tokenizer

        try:
            tokenizer = load_tokenizer(self.folder, eos_token_ids=self._configured_eos())
        except Exception as error:  # transformers and tokenizers raise many types for damaged files
            raise tokenizer_error(self.folder, error) from error
        if tokenizer.eos_token_id is None:
            raise UserError(f"{self.folder}: the tokenizer has no EOS token")
        self._check_ids(tokenizer)
        return tokenizer

    def stopping_at(self, ids: Sequence[int]) -> Any:
        """Return mlx-lm's tokenizer object, which stops at these ids as well."""
        self.wrapped.eos_token_ids = {*self.eos_token_ids, *ids}
        return self.wrapped

    def _config(self, name: str) -> dict[str, Any]:
        """A JSON file of the base's folder; empty if it is missing or damaged."""
        try:
            config = read_json(self.folder / name)
        except UserError:
            return {}
        return config if isinstance(config, dict) else {}

    def _configured_eos(self) -> list[int]:
        """EOS ids of generation_config.json, which counts first, and of config.json. Chat models often have several."""
        for name in ("generation_config.json", "config.json"):
            value = self._config(name).get("eos_token_id")
            ids = value if isinstance(value, list) else [value]
            if ids := [i for i in ids if type(i) is int and i >= 0]:
                return ids
        return []

    @cached_property
    def _rows(self) -> int | None:
        rows = self._config("config.json").get("vocab_size")
        return rows if type(rows) is int else None

    @property
    def num_embeddings(self) -> int | None:
        """Rows of the base's embedding, the vocab_size of its config; None if that states none."""
        return self._rows

    def _check_ids(self, tokenizer: Any) -> None:
        """Raise UserError for a token without a row in the base's embedding, which MLX would read from beyond its memory."""
        rows = self.num_embeddings
        if rows is None:
            return
        beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows and token not in PLACEHOLDERS}
        for token, i in sorted(beyond.items(), key=lambda item: item[1])[:1]:
            raise UserError(
                f"{self.folder}: the token {token!r} has id {i}, but the base's embedding has {rows} rows (vocab_size); "
                "remove the token from the tokenizer, or give a base whose embedding was resized"
            )

    @property
    def huggingface(self) -> Any:
        return self.wrapped._tokenizer

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """Ids that end a text: the tokenizer's EOS first, then those of the base's configuration."""
        return self._stops

    @cached_property
    def _stops(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys([self.wrapped.eos_token_id, *self._configured_eos()]))

    def apply_template(
        self, template: str, messages: list[dict[str, Any]], tools: list[Any] | None, add_generation_prompt: bool
    ) -> str:
        # Through mlx-lm's wrapper, which tells thinking models to think, as mlx_lm.generate does.
        return self.wrapped.apply_chat_template(
            messages, tools=tools, chat_template=template, add_generation_prompt=add_generation_prompt, tokenize=False
        )

    @property
    def bos_token_id(self) -> int:
        """The token that documents begin with.

        This is the tokenizer's BOS token. If it has none, as in Qwen3, it is the bos_token_id of config.json, or else
        EOS: these models were pretrained on documents separated by that token.
        """
        return self._first

    @cached_property
    def _first(self) -> int:
        if self.wrapped.bos_token_id is not None:
            return self.wrapped.bos_token_id
        config_id = read_json(self.folder / "config.json").get("bos_token_id")
        return config_id if isinstance(config_id, int) else self.wrapped.eos_token_id

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # names that copy and pickle look for
            raise AttributeError(name)
        return getattr(self.wrapped, name)
