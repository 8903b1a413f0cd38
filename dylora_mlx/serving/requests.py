"""Bodies of requests: parsed, checked against the limits, and written again with the fields that mlx-lm's handler reads.

Whatever passes here cannot stop the engine's thread: mlx-lm checks types, but not that a token exists or a number is finite.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from dylora_mlx.data import encoding, messages, rendering
from dylora_mlx.errors import UserError
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.serving.errors import ApiError
from dylora_mlx.serving.models import ServedModel, ServedModels

MAX_STOPS, MAX_STOP_CHARS, MAX_BIASES, MAX_DEPTH = 16, 200, 300, 64
GREEDY_BELOW = 1e-3
"""Temperatures below this one are 0: their logits would overflow."""

Penalty = Annotated[float, Field(ge=-100, le=100)]
Count = Annotated[int, Field(ge=0, le=1 << 20)]


def _reject(value: Any) -> None:
    if value is not None:
        raise ValueError("not supported here; leave it out")


Unsupported = Annotated[None, BeforeValidator(_reject)]
"""A field that would change the answer, if it were not ignored."""


class Limits(NamedTuple):
    """What one request may ask for."""

    max_body_bytes: int
    max_prompt_tokens: int
    max_tokens: int
    """Maximum number of generated tokens; a request that asks for more gets this many."""


class _Body(BaseModel):
    """Fields of every request. Others are ignored, as clients send many that mean nothing to a local model."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class StreamOptions(_Body):
    include_usage: bool = False


class ResponseFormat(_Body):
    type: str


class CompletionBody(_Body):
    """Fields that /v1/completions and /v1/chat/completions have in common."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Count | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | Literal[0] | None = None
    repetition_context_size: Count | None = None
    presence_penalty: Penalty | None = None
    presence_context_size: Count | None = None
    frequency_penalty: Penalty | None = None
    frequency_context_size: Count | None = None
    logit_bias: dict[str, Penalty] | None = None
    logprobs: bool | Annotated[int, Field(ge=0, le=11)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=11)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    stop: str | list[str] | None = None
    n: Literal[1] | None = None
    response_format: ResponseFormat | None = None
    routing: bool = False
    adapters: Unsupported = None
    draft_model: Unsupported = None
    chat_template_kwargs: Unsupported = None
    xtc_probability: Unsupported = None

    @field_validator("stop")
    @classmethod
    def _check_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
            raise ValueError(f"at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters")
        return value

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatBody(CompletionBody):
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None


class TextBody(CompletionBody):
    prompt: str | list[str] | list[int]
    echo: Literal[False] | None = None
    suffix: Unsupported = None
    best_of: Literal[1] | None = None


class RouteBody(_Body):
    text: str


class Prepared(NamedTuple):
    """A completion request that has passed every check."""

    body: dict[str, Any]
    """The body for mlx-lm's handler."""
    model: ServedModel
    ids: list[int]
    """Token ids of the prompt."""
    stops: list[str]
    """Texts that end the answer and are left out of it."""
    markers: list[str]
    """Texts that the prompt's format ends answers with."""
    top_logprobs: int | None
    """Number of likeliest tokens to report for each token; None for no log probabilities."""
    routing: bool
    """Whether to report the gates of every token."""


def parse_json(raw: bytes) -> dict[str, Any]:
    """Return the object that a body holds. Raises ApiError for anything else."""
    try:
        body = json.loads(raw.decode(), parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:120] if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise ApiError(400, f"the body is not JSON ({reason})", "invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", "invalid_json")
    if _depth(body) > MAX_DEPTH:
        raise ApiError(400, f"the body is nested more than {MAX_DEPTH} levels deep", "invalid_json")
    return body


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _depth(value: Any) -> int:
    """Return the levels of lists and objects in a value, counted level by level."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def validate(kind: type[_Body], body: dict[str, Any]) -> Any:
    """Return a body with its types checked. Raises ApiError that names the first wrong field."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = str(first["loc"][0]) if first["loc"] else None
        reason = first["msg"].removeprefix("Value error, ")
        message = f"{field}: {reason[0].lower()}{reason[1:]}" if field else reason
        raise ApiError(400, message[:300], "invalid_value", field) from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deep", "invalid_json") from error


class RequestReader:
    """Turns bodies into requests for the engine.

    Args:
        run: The run.
        models: Its model names.
        limits: What a request may ask for.
        default_max_tokens: Tokens to generate if a request does not say.
    """

    def __init__(self, run: OpenedRun, models: ServedModels, limits: Limits, default_max_tokens: int):
        self._run, self._models, self.limits = run, models, limits
        self._default_max_tokens = default_max_tokens

    def chat(self, raw: bytes) -> Prepared:
        """Read the body of /v1/chat/completions. Raises ApiError."""
        body = validate(ChatBody, parse_json(raw))
        model = self._models.find(self._models.name if body.model is None else body.model)
        tools = None if body.tool_choice == "none" else body.tools or None
        form, tokenizer = self._models.prompt_format(model, raw=False), self._run.base.tokenizer
        try:
            chat = messages.read_chat(body.messages, tools, False, "messages")
            if form.is_chat:
                text = rendering.chat_prompt(chat.messages, tokenizer, chat.tools, "messages")
                if tools:
                    self._check_tools(chat, text)
            elif tools:
                raise UserError("tools: the skills of this model were learned as plain text, which calls no tools")
            else:  # as the skills were learned: text to continue
                text = "\n\n".join(message["content"] for message in chat.messages)
            ids = encoding.prompt_ids(text, tokenizer, special=not form.is_chat).tolist()
        except UserError as error:
            field = "tools" if str(error).startswith("tools") else "messages"
            raise ApiError(400, str(error)[:300], "invalid_value", field) from error
        except (
            TypeError,
            ValueError,
            RecursionError,
        ) as error:  # content that no tokenizer reads, such as lone surrogates
            raise ApiError(
                400, f"messages: not readable text ({type(error).__name__})", "invalid_value", "messages"
            ) from error
        marker = rendering.end_marker(tokenizer) if form.is_chat else ""
        clean = {"messages": chat.messages, "tools": tools}
        return self._prepared(body, model, ids, clean, [marker] if marker else [])

    def text(self, raw: bytes) -> Prepared:
        """Read the body of /v1/completions. Raises ApiError."""
        body = validate(TextBody, parse_json(raw))
        model = self._models.find(self._models.name if body.model is None else body.model)
        return self._prepared(body, model, self._text_ids(body.prompt), {"prompt": ""}, [])

    def route(self, raw: bytes) -> str:
        """Read the body of /v1/route: the text. Raises ApiError."""
        text = validate(RouteBody, parse_json(raw)).text
        # Tokenized here to check its length: the engine's thread has better to do with a text that is refused.
        self._check_length(len(self._ids(text, "text")), "text")
        return text

    def _check_tools(self, chat: messages.Chat, text: str) -> None:
        tokenizer = self._run.base.tokenizer
        if rendering.chat_prompt(chat.messages, tokenizer, None, "messages") == text:
            raise UserError("tools: the chat template of this run writes none; leave them out")
        if not tokenizer.has_tool_calling:
            raise UserError("tools: mlx-lm cannot parse the calls of this run's chat template; leave them out")

    def _text_ids(self, prompt: str | list[str] | list[int]) -> list[int]:
        rows = self._run.base.args.vocab_size
        ids = [item for item in prompt if isinstance(item, int)] if isinstance(prompt, list) else []
        if ids:
            if not all(0 <= item < rows for item in ids):
                raise ApiError(400, f"prompt: token ids must be from 0 to {rows - 1}", "invalid_value", "prompt")
            return ids
        if isinstance(prompt, list):
            if len(prompt) != 1:
                raise ApiError(400, "prompt: one prompt a request; send several requests", "invalid_value", "prompt")
            (prompt,) = prompt  # type: ignore[assignment]
        return self._ids(str(prompt), "prompt")

    def _ids(self, text: str, field: str) -> list[int]:
        """Return the token ids of a text. Raises ApiError for one that cannot be tokenized."""
        try:
            return encoding.prompt_ids(text, self._run.base.tokenizer).tolist()
        except (UserError, TypeError, ValueError) as error:
            reason = str(error) if isinstance(error, UserError) else f"not readable text ({type(error).__name__})"
            raise ApiError(400, f"{field}: {reason}"[:300], "invalid_value", field) from error

    def _check_length(self, length: int, field: str) -> None:
        """Raise ApiError for a prompt or a text of too many tokens."""
        longest = min(self.limits.max_prompt_tokens, self._run.base.context_length - 1)
        if length > longest:
            what = "text" if field == "text" else "prompt"
            message = f"the {what} has {length} tokens, at most {longest} are read here; shorten it"
            raise ApiError(400, message, "context_length_exceeded", field)

    def _prepared(
        self, body: CompletionBody, model: ServedModel, ids: list[int], clean: dict[str, Any], markers: list[str]
    ) -> Prepared:
        self._check_length(len(ids), "messages" if "messages" in clean else "prompt")
        if body.response_format is not None and body.response_format.type != "text":
            raise ApiError(400, "response_format: only text is supported", "invalid_value", "response_format")
        top_logprobs = self._top_logprobs(body)
        asked = body.max_completion_tokens or body.max_tokens or self._default_max_tokens
        clean |= {
            "model": model.name,
            "stream": body.stream,
            "stream_options": body.stream_options and body.stream_options.model_dump(),
            "max_tokens": min(asked, self.limits.max_tokens, self._run.base.context_length - len(ids)),
            "logprobs": top_logprobs is not None,
            "top_logprobs": top_logprobs or -1,
        }
        copied = (
            "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "repetition_context_size", "presence_penalty",
            "presence_context_size", "frequency_penalty", "frequency_context_size", "seed",
        )  # fmt: skip
        clean |= {name: value for name in copied if (value := getattr(body, name)) is not None}
        if clean.get("temperature", 1.0) < GREEDY_BELOW:
            clean["temperature"] = 0.0
        self._check_vocabulary(body, clean)
        return Prepared(clean, model, ids, body.stops, markers, top_logprobs, body.routing)

    def _top_logprobs(self, body: CompletionBody) -> int | None:
        if isinstance(body.logprobs, bool) or body.logprobs is None:
            top = (body.top_logprobs or 0) if body.logprobs else None
        else:  # the form of /v1/completions
            top = body.logprobs
        if top is not None and body.stream:
            raise ApiError(400, "logprobs: not in a stream; set stream to false", "invalid_value", "logprobs")
        return top

    def _check_vocabulary(self, body: CompletionBody, clean: dict[str, Any]) -> None:
        """Check what refers to tokens. Raises ApiError."""
        rows = self._run.base.args.vocab_size
        if (body.top_k or 0) >= rows:
            raise ApiError(400, f"top_k: there are {rows} tokens to choose from", "invalid_value", "top_k")
        bias = body.logit_bias or {}
        known = all(key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < rows for key in bias)
        if len(bias) > MAX_BIASES or not known:
            message = f"logit_bias: at most {MAX_BIASES} token ids from 0 to {rows - 1}"
            raise ApiError(400, message, "invalid_value", "logit_bias")
        if bias:
            clean["logit_bias"] = bias
