"""A run, ready to answer prompts: by token, by prompt, or with one expert for everything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import numpy as np

from dylora_mlx.errors import UserError
from dylora_mlx.exporting import formats
from dylora_mlx.generation import decode, stream
from dylora_mlx.generation.decode import TokenRouted
from dylora_mlx.generation.stream import GenerationSummary, Sampling, TextPiece
from dylora_mlx.run.run_folder import OpenedRun


class GenerationSettings(NamedTuple):
    """routing: experts for every token, or once for the prompt; expert: a skill's name, a column's number or base, for
    everything; template: whether prompts go through the base's chat template, where it has one."""

    max_tokens: int = 256
    routing: Literal["token", "prompt"] = "token"
    expert: str | None = None
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    chat_template: bool = True


class Session:
    """Answers prompts, one after another; with a chat template, each answer knows what was said before.

    Raises UserError for an expert that there is none of, for more tokens to sample from than there are, and for routing by
    token where experts are mixed in the logits.
    """

    def __init__(self, run: OpenedRun, settings: GenerationSettings):
        self.run, self.settings = run, settings
        self.names = formats.expert_names(run.pool)
        self.routing = formats.mixture_routing(run).routing
        self.messages: list[dict[str, str]] = []
        vocabulary = run.base.args.vocab_size
        if settings.sampling.top_k >= vocabulary:
            raise UserError(
                f"--top-k {settings.sampling.top_k}: {run.base.name} has {vocabulary} tokens to choose from"
            )
        self.forced = self._forced(settings.expert)
        if settings.routing == "token" and self.forced is None and run.model.mixing != "layers":
            raise UserError("model.mixing: logits has no caches to generate with; use --routing prompt or --expert")

    def _forced(self, name: str | None) -> int | None:
        if name is None:
            return None
        return 0 if name == formats.NULL_EXPERT else formats.find_expert(self.run.pool, self.run.library, name)

    @property
    def uses_chat_template(self) -> bool:
        return self.settings.chat_template and self.run.base.tokenizer.chat_template is not None

    def tokens(self, prompt: str) -> np.ndarray:
        """Token ids int32 [L] of a prompt, by the chat template where there is one. Raises UserError for one that is too
        long."""
        tokenizer = self.run.base.tokenizer
        if self.uses_chat_template:
            messages = [*self.messages, {"role": "user", "content": prompt}]
            chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
            found = np.array(chat, np.int32)
        else:
            found = stream.encode_prompt(tokenizer, prompt)
        context = self.run.base.context_length
        if len(found) >= context:
            raise UserError(f"the prompt has {len(found)} tokens, the base reads {context} at most; shorten it")
        return found

    def prompt_gates(self, ids: np.ndarray) -> np.ndarray | None:
        """Gates [E] for the whole text; None where every token has its own."""
        if self.forced is not None:
            return np.eye(len(self.names), dtype=np.float32)[self.forced]
        if self.settings.routing == "prompt":
            return decode.prompt_gates(self.run.model, ids, self.routing)
        return None

    def answer(self, prompt: str, ids: np.ndarray, gates: np.ndarray | None) -> Iterator[TextPiece | GenerationSummary]:
        """Pieces of text as they come, then a summary. ids, gates: of the prompt, from `tokens` and `constant`."""
        room = min(self.settings.max_tokens, self.run.base.context_length - len(ids))
        if gates is None:
            place: Any = nullcontext(TokenRouted(self.run.model, self.routing))
        else:
            place = decode.fused_experts(self.run.base, self.run.model, gates)
        text = ""
        with place as model:
            tokenizer = self.run.base.tokenizer.wrapped
            for piece in stream.stream_text(model, tokenizer, ids, room, self.settings.sampling, self.settings.stop):
                text += piece.text if isinstance(piece, TextPiece) else ""
                yield piece
        if self.uses_chat_template:
            self.messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]

    def gate_shares(self, gates: np.ndarray) -> dict[str, float]:
        """Gates of a whole prompt by name, the largest first, those that do not count left out."""
        return {self.names[int(c)]: float(gates[c]) for c in np.argsort(-gates) if gates[c] > 0.005}
