"""Chat messages of a record, checked and brought into the form that chat templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dylora_mlx.errors import UserError

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "model", "tool", "function", "ipython")
"""Roles that chat templates know. `model` is Gemma's name of the assistant."""
ASSISTANT = ("assistant", "model")
_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "assistant": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip
_TEXT_PARTS = ("text", "input_text", "output_text")
_FLAGS = ("weight", "train")


class Chat(NamedTuple):
    """A conversation, and which of its messages are targets of the loss."""

    messages: list[Message]
    """As a chat template takes them: role, content (text), and every other field of the record's message."""
    learned: list[bool]
    """For each message, whether the loss covers it."""
    tools: list[Any] | None = None
    """Tool definitions, JSON schemas of functions; None for none."""


def read_chat(messages: Any, tools: Any, learn_prompt: bool, location: str) -> Chat:
    """Check and normalise the messages of a record.

    Content in parts is joined, arguments of tool calls are decoded from JSON. An assistant's message is learned unless it has
    `weight: 0` or `train: false`; the others only with `learn_prompt`. Raises UserError, prefixed with `location`.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f"{location}: a list of messages is needed, each with role and content")
    chat = Chat([], [], _tools(tools, location))
    for number, message in enumerate(messages, 1):
        place = f"{location}, message {number}"
        normal, weight = _message(message, place)
        chat.messages.append(normal)
        chat.learned.append(weight and (learn_prompt or normal["role"] == "assistant"))
    return chat


def read_prompt_and_completion(prompt: Any, completion: Any, tools: Any, learn_prompt: bool, location: str) -> Chat:
    """Return the chat of a record whose prompt or completion is a list of messages; only the completion's turns are learned.

    A prompt that is text becomes the user's turn, a completion that is text the assistant's.
    """
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    after = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
    chat = read_chat([*before, *after], tools, learn_prompt, location)
    learned = [flag and (learn_prompt or number >= len(before)) for number, flag in enumerate(chat.learned)]
    return chat._replace(learned=learned)


def from_sharegpt(turns: Any, location: str) -> list[Message]:
    """Return ShareGPT's turns, {from, value}, as messages. Raises UserError for an unknown speaker."""
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise UserError(f"{location}: a list of turns is needed, each with from and value")
    messages = []
    for number, turn in enumerate(turns, 1):
        if "role" in turn:
            messages.append(dict(turn))
            continue
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES or "value" not in turn:
            known = ", ".join(_SHAREGPT_ROLES)
            raise UserError(
                f"{location}, turn {number}: from is {speaker!r:.40}, and must be one of {known}, with a value"
            )
        rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
        messages.append({"role": _SHAREGPT_ROLES[speaker], "content": turn["value"], **rest})
    return messages


def _message(message: Any, place: str) -> tuple[Message, bool]:
    """Return a message in normal form, and whether it counts in the loss by its own weight."""
    if not isinstance(message, Mapping) or "role" not in message:
        raise UserError(f"{place}: role and content are needed")
    role = message["role"]
    if role not in ROLES:
        is_sharegpt = isinstance(role, str) and role in _SHAREGPT_ROLES
        hint = "; turns with from and value are read with preset: sharegpt" if is_sharegpt else ""
        raise UserError(f"{place}: the role {role!r:.40} is none of {', '.join(ROLES)}; correct the record{hint}")
    if "content" not in message and not message.get("tool_calls") and not message.get("function_call"):
        raise UserError(f"{place}: role and content are needed")
    normal = {name: value for name, value in message.items() if name not in _FLAGS and value is not None}
    normal["role"] = "assistant" if role == "model" else role
    normal["content"] = _content(message.get("content"), place)
    if message.get("function_call"):  # OpenAI's form before tool calls
        normal.pop("function_call")
        message = {**message, "tool_calls": [{"type": "function", "function": message["function_call"]}]}
    if message.get("tool_calls"):
        normal["tool_calls"] = [
            _tool_call(call, place) for call in _sequence(message["tool_calls"], "tool_calls", place)
        ]
    return normal, _weight(message, place)


def _content(content: Any, place: str) -> str:
    """Return content as text: None is empty, parts of text are put together."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, (int, float)) and not isinstance(content, bool):
        return str(content)
    if not isinstance(content, Sequence):
        raise UserError(f"{place}: content is a {type(content).__name__}; text is needed, or a list of text parts")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if kind not in _TEXT_PARTS:
            raise UserError(f"{place}: a part of type {kind!r:.40}; only text can be learned, leave such records out")
        if not isinstance(text, str):
            raise UserError(f"{place}: a part of the content has no text")
        texts.append(text)
    return "".join(texts)


def _weight(message: Mapping[str, Any], place: str) -> bool:
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and weight not in (0, 1):
        raise UserError(f"{place}: weight is {weight!r:.40}; it is 0 (not learned) or 1")
    if train is not None and not isinstance(train, bool):
        raise UserError(f"{place}: train is {train!r:.40}; it is true or false")
    return weight != 0 and train is not False


def _tool_call(call: Any, place: str) -> Any:
    """Return a tool call with its arguments as an object: OpenAI's are JSON text, and templates would encode them twice."""
    function = call.get("function") if isinstance(call, Mapping) else None
    target = function if isinstance(function, Mapping) else call
    if not isinstance(target, Mapping) or not isinstance(target.get("name"), str):
        raise UserError(f"{place}: a tool call needs a function with a name and arguments")
    arguments = target.get("arguments", {})
    if isinstance(arguments, str):
        try:
            decoded = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise UserError(f"{place}: arguments of the call of {target['name']!r:.40} are not JSON") from error
        arguments = decoded if isinstance(decoded, dict) else arguments
    changed = {**target, "arguments": arguments}
    return {**call, "function": changed} if target is function else changed


def _tools(tools: Any, location: str) -> list[Any] | None:
    if isinstance(tools, str):  # data sets often keep nested columns as JSON text
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise UserError(f"{location}: tools is not JSON; a list of function definitions is needed") from error
    if not tools:
        return None
    tools = list(_sequence(tools, "tools", location))
    for tool in tools:
        if not isinstance(tool, Mapping) or not isinstance(tool_name(tool), str):
            raise UserError(f"{location}: an entry of tools has no function with a name")
    return tools


def tool_name(tool: Mapping[str, Any]) -> Any:
    """Return the name of a tool definition or of a tool call, with or without the wrapper {type, function}."""
    function = tool.get("function")
    return (function if isinstance(function, Mapping) else tool).get("name")


def _sequence(value: Any, name: str, place: str) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"{place}: {name} is a {type(value).__name__}; a list is needed")
    return value
