"""A loaded run that answers prompts: routed per token, per prompt, or with one expert for everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import numpy as np

from dylora_mlx.data.messages import Message
from dylora_mlx.errors import UserError
from dylora_mlx.exporting import formats
from dylora_mlx.generation import decode, stream
from dylora_mlx.generation.batch import BatchPrompt, BatchText, generate_texts
from dylora_mlx.generation.decode import TokenRouted
from dylora_mlx.generation.stream import GenerationSummary, Sampling, TextPiece
from dylora_mlx.run.prompt_format import choose_format
from dylora_mlx.run.run_folder import OpenedRun


class GenerationSettings(NamedTuple):
    """Settings of a generation session."""

    max_tokens: int = 256
    """Maximum number of generated tokens per prompt."""
    routing: Literal["token", "prompt"] = "token"
    """token: choose experts for every token. prompt: choose them once and fuse them into the base."""
    expert: str | None = None
    """Expert that serves everything, instead of the router: a skill's name, an expert's number, or base."""
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    """Strings that end the text and are left out of it."""
    raw: bool = False
    """Ask with the prompt's text alone, in whatever form the skills were learned."""
    system: str | None = None
    """System message of the conversation. Prompts are then asked as chats."""


class Session:
    """Answers prompts one after another, in the form that the skills were learned in. As a chat, each answer continues the
    conversation.

    Raises UserError for an unknown expert, for a top-k that is not below the vocabulary size, and for per-token routing
    if experts are mixed in the logits.

    `names` holds the expert names by expert_id; `forced` is the expert_id that serves everything, or None.
    """

    def __init__(self, run: OpenedRun, settings: GenerationSettings):
        self.run, self.settings = run, settings
        self.names = formats.expert_names(run.pool)
        self.routing = formats.mixture_routing(run).routing
        self.messages: list[Message] = []
        vocab_size = run.base.args.vocab_size
        if settings.sampling.top_k >= vocab_size:
            raise UserError(
                f"--top-k {settings.sampling.top_k}: {run.base.name} has {vocab_size} tokens to choose from"
            )
        self.forced = self._forced_expert(settings.expert)
        self.format = choose_format(
            run.library, run.base.tokenizer, self.forced, settings.raw, chat=settings.system is not None
        )
        if settings.routing == "token" and self.forced is None:
            decode.check_has_caches(run.model, "use --routing prompt or --expert")

    def _forced_expert(self, name: str | None) -> int | None:
        if name is None:
            return None
        return 0 if name == formats.NULL_EXPERT else formats.find_expert(self.run.pool, self.run.library, name)

    def tokens(self, prompt: str) -> np.ndarray:
        """Return the token ids, int32 [L], of a prompt, after the conversation so far if it is a chat.

        Raises UserError for a prompt that does not fit the base's context.
        """
        tokenizer = self.run.base.tokenizer
        system = [] if self.settings.system is None else [{"role": "system", "content": self.settings.system}]
        ids = self.format.ids(prompt, tokenizer, [*system, *self.messages])
        context_length = self.run.base.context_length
        if len(ids) >= context_length:
            raise UserError(f"the prompt has {len(ids)} tokens, the base reads {context_length} at most; shorten it")
        return ids

    def prompt_gates(self, ids: np.ndarray) -> np.ndarray | None:
        """Return gates [E] for the whole text, or None if every token is routed separately."""
        if self.forced is not None:
            return np.eye(len(self.names), dtype=np.float32)[self.forced]
        if self.settings.routing == "prompt":
            return decode.prompt_gates(self.run.model, ids, self.routing)
        return None

    def answer(self, prompt: str, ids: np.ndarray, gates: np.ndarray | None) -> Iterator[TextPiece | GenerationSummary]:
        """Yield pieces of text as they are generated, then a summary.

        Args:
            prompt: the user's message, for the chat history.
            ids: its token ids, from `tokens`.
            gates: its gates, from `prompt_gates`.
        """
        max_tokens = min(self.settings.max_tokens, self.run.base.context_length - len(ids))
        if gates is None:
            model_context: Any = nullcontext(TokenRouted(self.run.model, self.routing))
        else:
            model_context = decode.fused_experts(self.run.base, self.run.model, gates)
        text = ""
        with model_context as model:
            tokenizer = self.run.base.tokenizer
            stop_ids, stop_texts = self.format.stops(tokenizer)
            stops = (*self.settings.stop, *stop_texts)
            for piece in stream.stream_text(
                model, tokenizer.stopping_at(stop_ids), ids, max_tokens, self.settings.sampling, stops
            ):
                text += piece.text if isinstance(piece, TextPiece) else ""
                yield piece
        if self.format.is_chat:
            self.messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]

    def answer_all(self, prompts: Sequence[str], on_done: Callable[[], None] = lambda: None) -> list[BatchText]:
        """Return the answers to many prompts, each asked after the conversation so far, which they do not continue.

        Args:
            prompts: the users' messages.
            on_done: called after each answer.

        Raises UserError for a prompt that does not fit the base's context, with its number.
        """
        tokenizer = self.run.base.tokenizer
        stop_ids, stop_texts = self.format.stops(tokenizer)
        stops, batch = (*self.settings.stop, *stop_texts), []
        for number, prompt in enumerate(prompts, 1):
            try:
                ids = self.tokens(prompt)
            except UserError as error:
                raise UserError(f"prompt {number}: {error}") from error
            gates = self.prompt_gates(ids) if self.forced is None else None
            max_tokens = min(self.settings.max_tokens, self.run.base.context_length - len(ids))
            batch.append(BatchPrompt(ids, max_tokens, stops, gates))
        with self._batch_model() as model:
            return generate_texts(model, tokenizer.stopping_at(stop_ids), batch, self.settings.sampling, on_done)

    def _batch_model(self) -> AbstractContextManager[Any]:
        """Return a context with the model of many prompts: with one expert for everything it costs what the base does."""
        if self.forced is None:
            return nullcontext(TokenRouted(self.run.model, self.routing))
        gates = np.eye(len(self.names), dtype=np.float32)[self.forced]
        return decode.fused_experts(self.run.base, self.run.model, gates)

    def gate_shares(self, gates: np.ndarray) -> dict[str, float]:
        """Return a whole prompt's gates above 0.005 by expert name, the largest first."""
        return {self.names[int(c)]: float(gates[c]) for c in np.argsort(-gates) if gates[c] > 0.005}
