"""mlx_lm.server's engine with a run as its model: continuous batches, and a prompt cache for each way to compute a row.

The engine's thread owns the model. Its interface is that of two versions of mlx-lm, 0.31 and 0.32.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, Queue
from typing import Any, NamedTuple, TypeVar, cast
from weakref import WeakSet

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import CacheList, KVCache, LRUPromptCache
from mlx_lm.server import CompletionRequest, ModelProvider, ResponseGenerator

from dylora_mlx.errors import Failure
from dylora_mlx.generation.decode import TokenRouted
from dylora_mlx.serving.gate_trace import TracedModel, with_trace, without_trace
from dylora_mlx.serving.models import Row

Result = TypeVar("Result")


class Prompt(list):
    """Token ids of a prompt, or of a text so far, with how its row is computed.

    mlx-lm's server cuts and extends its prompts before it asks for their caches; a slice belongs to the same row.

    Args:
        ids: The token ids.
        row: How the row is computed.
        ignores_cache: Compute the prompt from its first token, whatever the cache holds.
    """

    def __init__(self, ids: list[int], row: Row, ignores_cache: bool = False):
        super().__init__(ids)
        self.row, self.ignores_cache = row, ignores_cache

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        return Prompt(part, self.row, self.ignores_cache) if isinstance(key, slice) else part


@dataclass
class RowRequest(CompletionRequest):
    """A request whose prompt is tokenized already; to mlx-lm it is one of an empty text."""

    ids: list[int] = field(default_factory=list)
    find_row: Callable[[list[int]], Row] = lambda ids: Row("token", None)
    """Called on the engine's thread, as it may compute the gates of the prompt."""


class Job(NamedTuple):
    """Work of another thread that needs the model, in place of a request."""

    run: Callable[[], Any]


class PromptCache(LRUPromptCache):
    """mlx-lm's cache of prompts, apart for each way to compute a row.

    Args:
        max_size: Maximum number of texts.
        max_bytes: Maximum size of their caches.
        new_cache: Returns empty caches for a row, with those of the draft model if there is one.
        has_draft: Whether there is one.
    """

    def __init__(self, max_size: int, max_bytes: int, new_cache: Callable[[Row], list[Any]], has_draft: bool):
        super().__init__(max_size, max_bytes)
        self._new_cache, self._has_draft = new_cache, has_draft

    def fetch_nearest_cache(self, model: Any, tokens: Any) -> tuple[list[Any], Any]:
        """Return caches of the longest known beginning of a prompt, and the rest of it, which is never empty.

        A prompt without a known beginning gets empty caches, which say how its row is computed.
        """
        cache, rest = None, list[int]()
        if not tokens.ignores_cache:
            # mlx-lm's engine has no answer for a prompt that is cached whole: the last token must be left to compute.
            cache, rest = super().fetch_nearest_cache((model, tokens.row.key), list(tokens[:-1]))
        if cache is None:
            return with_trace(self._new_cache(tokens.row), tokens.row.trace), tokens
        return with_trace(cache, tokens.row.trace), tokens[len(tokens) - 1 - len(rest) :]

    def insert_cache(self, model: Any, tokens: Any, prompt_cache: list[Any], **options: Any) -> None:
        """Keep the caches of a text."""
        prompt_cache = without_trace(prompt_cache)
        if self._has_draft:
            # mlx-lm takes back what its last draft added when it gets round to it, so these caches may be one token wrong at
            # their end, and change later; the draft's own end one token earlier.
            prompt_cache = copy.deepcopy(prompt_cache)
            lengths = [(layer[0] if isinstance(layer, CacheList) else layer).offset for layer in prompt_cache]
            tokens = tokens[: min(len(tokens) - 1, *lengths)]
            for layer, length in zip(prompt_cache, lengths, strict=True):
                layer.trim(length - len(tokens))
        # The caches of a row that left a batch are slices, not yet computed, that would keep the whole batch in memory.
        mx.eval([layer.state for layer in prompt_cache])
        super().insert_cache((model, tokens.row.key), list(tokens), prompt_cache, **options)


class BaseDraft(nn.Module):
    """The bare base as a draft model, with caches that can be trimmed on sliding layers too."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base: Any = base

    @property
    def layers(self) -> list[Any]:
        return self.base.layers

    def make_cache(self) -> list[Any]:
        return [KVCache() for _ in self.layers]

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        return self.base(tokens, cache=cache)


class RunProvider(ModelProvider):
    """Provides a run's model, which is loaded already. Every model name of a request is a way to compute its row.

    Args:
        cli_args: Options by mlx_lm.server's names.
        model: The routed model.
        tokenizer: mlx-lm's tokenizer.
        draft_model: Model that drafts tokens; None to batch requests instead.
    """

    def __init__(self, cli_args: Any, model: TokenRouted, tokenizer: Any, draft_model: BaseDraft | None):
        super().__init__(cli_args)
        self.model_key = ("run", None, None)
        self.model, self.tokenizer, self.draft_model = TracedModel(model), tokenizer, draft_model
        self.is_batchable = draft_model is None

    def load(self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None) -> Any:
        return self.model, self.tokenizer

    def load_default(self) -> None:
        pass


class Engine(ResponseGenerator):
    """mlx-lm's generator of responses. It starts its thread at once; `stop_and_join` ends it."""

    def __init__(self, provider: RunProvider, max_bytes: int):
        draft = provider.draft_model

        def new_cache(row: Row) -> list[Any]:
            return cast(Any, provider.model).make_cache(row.fixed_gates) + (draft.make_cache() if draft else [])

        self._waiting: WeakSet[Queue[Any]] = WeakSet()
        size = provider.cli_args.prompt_cache_size
        super().__init__(provider, PromptCache(size, max_bytes, new_cache, draft is not None))

    @property
    def is_alive(self) -> bool:
        """Whether requests are served: False once the thread has ended."""
        return self._generation_thread.is_alive()

    @property
    def is_healthy(self) -> bool:
        return self.is_alive

    def submit(self, work: Callable[[], Result]) -> Result:
        """Run work on the engine's thread, between two steps of the batch, and return its result.

        Raises what the work raises, and Failure if the engine has ended.
        """
        results: Queue[Any] = Queue()
        self.requests.put((results, Job(work), None))
        while True:
            try:
                result, error = results.get(timeout=1.0)
            except Empty:
                if not self.is_alive:
                    raise Failure("the engine has ended") from None
                continue
            if error is not None:
                raise error
            return result

    def _generate(self) -> None:
        try:
            super()._generate()
        except Exception as error:  # of the model, or of mlx-lm's engine itself, which does not go on after it
            details = logging.getLogger().isEnabledFor(logging.DEBUG)
            logging.error("the engine has ended: %s: %s", type(error).__name__, error, exc_info=details)
            for results in [*self._waiting, *self._unread()]:
                results.put(Failure("the engine has ended"))
        finally:
            # A step that nobody waits for may be at work. Streams of a thread that is gone abort the process at its end.
            mx.synchronize(generation_stream)
            mx.synchronize()
            mx.clear_streams()

    def _unread(self) -> Iterator[Queue[Any]]:
        """Yield the queues of the requests that the engine has not begun."""
        with suppress(Empty):
            while True:
                yield self.requests.get_nowait()[0]

    def _next_request(self, timeout: float | None = None) -> Any:
        request = super()._next_request(timeout)
        if request is None:
            return None
        if not isinstance(request[1], Job):
            self._waiting.add(request[0])
            return request
        results, job, _ = request
        try:
            results.put((job.run(), None))
        except Exception as error:
            results.put((None, error))
        return None

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        # The rest is the initial state and, in newer versions, the images.
        _, _, _, initial_state, *images = super()._tokenize(tokenizer, request, args)
        if tokenizer.has_thinking:
            start, end = tokenizer.rfind_think_start(request.ids), tokenizer.rfind_think_end(request.ids)
            initial_state = "reasoning" if start > end else initial_state
        # Outside a batch, mlx-lm's penalties see the computed tokens only, so the answer would depend on the cache.
        penalties = args.logits.repetition_penalty, args.logits.presence_penalty, args.logits.frequency_penalty
        ignores_cache = any(penalties) and not self._is_batchable(args)
        prompt = Prompt(request.ids, request.find_row(request.ids), ignores_cache)
        if len(prompt) == 1:
            return prompt, [prompt], ["assistant"], initial_state, *images
        # Two segments: the caches are kept at the end of the first, before the answer, for others with the same beginning.
        return prompt, [prompt[:-1], prompt[-1:]], ["user", "assistant"], initial_state, *images

    def _log_cache_stats(self) -> None:
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            super()._log_cache_stats()
