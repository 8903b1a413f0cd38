"""One model of a run as lm-evaluation-harness sees it. Importing this module needs the package lm-eval."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.evaluate import MLXLM, chat_template_fn

from dylora_mlx.data import rendering
from dylora_mlx.generation.batch import BatchPrompt, generate_texts
from dylora_mlx.generation.stream import Sampling
from dylora_mlx.run.prompt_format import choose_format
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.system import console

STEP_LOGITS = 1 << 26
"""Logits that a step computes at most, 256 MB in float32: its positions times the vocabulary."""
_Wrapper: Any = MLXLM  # its decorator, which registers it with the harness, hides its type


class HarnessModel(_Wrapper):
    """mlx-lm's wrapper around the base, the mixture or a single expert of a run.

    Token ids and passes are the wrapper's own: a context is read once, each continuation after a copy of its caches. It
    differs at the ends of a text. An empty context is the token that documents begin with, which also comes before a text
    whose perplexity is measured; such a text is read in windows of the base's context length. A generated text ends at
    its stop strings, while the wrapper goes on for thousands of tokens and then cuts them off.

    Args:
        run: the run.
        name: the model's name in the results.
        model: the base, or what stands for it: an mlx-lm model or `TokenRouted`.
        chat: ask through the run's chat template.
        max_tokens: maximum number of generated tokens where a task names none.
    """

    def __init__(self, run: OpenedRun, name: str, model: nn.Module, chat: bool = False, max_tokens: int = 256):
        import_module("lm_eval.api.model").LM.__init__(self)  # not the wrapper's own, which loads a model from a folder
        stop_ids, self._stop_texts = (
            choose_format(run.library, run.base.tokenizer, chat=True).stops(run.base.tokenizer) if chat else ([], [])
        )
        self.name, self._model, self._max_new_tokens = name, model, max_tokens
        self.tokenizer = run.base.tokenizer.stopping_at(stop_ids)
        self.use_chat_template, self._max_tokens = chat, run.base.context_length
        template = rendering.effective_template(run.base.tokenizer)
        self.apply_chat_template = partial(chat_template_fn(chat_template=template), self)
        self._first = int(run.base.tokenizer.bos_token_id)
        (first_text,) = run.base.tokenizer.token_texts([self._first])
        self._beginning = "" if self._tokenize([""])[0] else first_text
        self._step_size = max(16, min(2048, STEP_LOGITS // run.base.args.vocab_size))

    def _process_prompt(self, prompt: Sequence[int], step_size: int | None = None) -> tuple[mx.array, list[Any]]:
        return super()._process_prompt(prompt, step_size or self._step_size)

    def _score_fn(
        self, inputs: Any, cache: Any = None, step_size: int | None = None
    ) -> tuple[mx.array, mx.array, mx.array]:
        return super()._score_fn(inputs, cache, step_size or self._step_size)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, in nats, and whether greedy decoding would write it.

        A request's `args` are a context and a continuation. A context that leaves no room is cut at its beginning.
        """
        by_context: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            by_context[request.args[0]].append(index)
        found = [(0.0, False)] * len(requests)
        for context, indices in console.track(by_context.items(), self.name, len(by_context)):
            before = self._tokenize([context or self._beginning])[0]
            continuations = [self._continuation_ids(before, *requests[index].args) for index in indices]
            room = self._max_tokens + 1 - max(map(len, continuations))
            logprobs, cache = self._process_prompt(before[-max(room, 1) :])
            for index, continuation in zip(indices, continuations, strict=True):
                found[index] = self._score(logprobs, cache, continuation)
        return found

    def _continuation_ids(self, before: Sequence[int], context: str, continuation: str) -> Sequence[int]:
        """Return the ids that the text of both has beyond those of the context, as the wrapper does."""
        ids = self._tokenize([(context or self._beginning) + continuation])[0][len(before) :]
        # One token may hold the end of the context with all of the continuation; then the continuation is read alone.
        return ids or self.tokenizer.encode(continuation, add_special_tokens=False)

    def _score(self, logprobs: mx.array, cache: list[Any], continuation: Sequence[int]) -> tuple[float, bool]:
        """Return the log-likelihood of token ids, in nats, and whether each is the likeliest.

        Args:
            logprobs: log-probabilities [1, V] of the first one.
            cache: the caches of what comes before, which stay as they are.
            continuation: the ids.
        """
        if not continuation:
            return 0.0, True
        score = float(np.array(logprobs[0, continuation[0]]))
        is_greedy = int(np.array(mx.argmax(logprobs))) == continuation[0]
        if len(continuation) > 1:
            rest, _, flags = self._score_fn(mx.array([*continuation])[None], copy.deepcopy(cache))
            score += float(np.array(rest, np.float64).sum())
            is_greedy = is_greedy and bool(np.array(flags).all())
        return score, is_greedy

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return the log-likelihood of every text, in nats, all of its tokens included. A request's `args` are the text."""
        harness, scores = import_module("lm_eval.utils"), []
        for request in console.track(requests, self.name, len(requests)):
            ids = self.tokenizer.encode(request.args[0], add_special_tokens=False)
            windows = harness.get_rolling_token_windows(ids, self._first, self._max_tokens, 1)
            pairs = map(harness.make_disjoint_window, windows)
            scores.append(sum(self._score(*self._process_prompt(before), after)[0] for before, after in pairs))
        return scores

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the text after each context, up to a stop string. A request's `args` are the context and its options.

        A context is cut at its beginning to leave room for the text. Tasks that ask for sampling get it.
        """
        harness = import_module("lm_eval.models.utils")
        options = [harness.normalize_gen_kwargs(request.args[1], self._max_new_tokens) for request in requests]
        prompts = [self._batch_prompt(request.args[0], each) for request, each in zip(requests, options, strict=True)]
        by_sampling: dict[Sampling, list[int]] = defaultdict(list)
        for index, each in enumerate(options):
            by_sampling[_sampling(each)].append(index)
        texts = [""] * len(requests)
        with console.progress(self.name, len(requests)) as progress:
            for sampling, indices in by_sampling.items():
                chosen = [prompts[index] for index in indices]
                found = generate_texts(self._model, self.tokenizer, chosen, sampling, progress.advance)
                for index, text in zip(indices, found, strict=True):
                    texts[index] = self._without_thoughts(text.text)
        return texts

    def _batch_prompt(self, context: str, options: dict[str, Any]) -> BatchPrompt:
        ids = self._tokenize([context or self._beginning])[0]
        longest = min(options["max_gen_toks"], self._max_tokens - 1)
        kept = ids[max(0, len(ids) - (self._max_tokens - longest)) :]
        return BatchPrompt(np.array(kept, np.int32), longest, (*options["until"], *self._stop_texts))

    def _without_thoughts(self, text: str) -> str:
        """Return what a thinking model writes after its thoughts."""
        if not self.tokenizer.has_thinking:
            return text
        _, ended, answer = text.partition(self.tokenizer.think_end)
        return answer if ended else text


def _sampling(options: dict[str, Any]) -> Sampling:
    """Return the sampling that a task asks for, in the names of transformers; greedy where it asks for none."""
    temperature = float(options.get("temperature", 0.0))
    if not temperature:
        return Sampling()
    limits = (float(options.get(name, 0.0)) for name in ("top_p", "min_p"))
    return Sampling(temperature, *limits, top_k=int(options.get("top_k", 0)))
