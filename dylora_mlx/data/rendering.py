"""The text of samples and of prompts. Training and generation share them, so prompts match the training data.

A sample is plain text, a prompt with a completion, or a chat. `render` returns its text with the spans that are learned,
`chat_prompt` returns a prompt for the next answer; `data.encoding` turns both into token ids.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple

from dylora_mlx.data.encoding import RenderedText, TextTokenizer, crossed
from dylora_mlx.data.messages import Chat, Message, tool_name
from dylora_mlx.errors import UserError

FormatKind = Literal["plain", "prompt", "chat"]
BUILTIN_TEMPLATES = ("gemma", "chatml")
"""Chat templates that ship with the package, for bases that have none."""
DEFAULT_TEMPLATE = "gemma"
_PLACEHOLDER_CONTENT = "\N{SECTION SIGN}content\N{SECTION SIGN}"
_BEGIN, _END = "\x02", "\x03"
_GENERATION_TAG = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")


class SkillFormat(NamedTuple):
    """The form of the samples that a skill was learned from, and so of the prompts that its expert answers."""

    kind: FormatKind
    template: str = ""
    """Start of the sha256 of the chat template; empty for other kinds."""

    @classmethod
    def parse(cls, text: str) -> SkillFormat | None:
        """Parse the text that `str` returns; None for any other text."""
        kind, _, template = text.partition(":")
        return cls(kind, template) if kind in ("plain", "prompt", "chat") else None  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.kind}:{self.template}" if self.template else self.kind


PLAIN_FORMAT = SkillFormat("plain")


class Plain(NamedTuple):
    """Plain text, learned whole."""

    text: str


class PromptCompletion(NamedTuple):
    """A prompt and the completion that is learned."""

    prompt: str
    completion: str
    learn_prompt: bool = False


Sample = Plain | PromptCompletion | Chat


def kind_of(sample: Sample) -> FormatKind:
    return "plain" if isinstance(sample, Plain) else "prompt" if isinstance(sample, PromptCompletion) else "chat"


def format_of(kind: FormatKind, tokenizer: TextTokenizer) -> SkillFormat:
    """Return the format of samples of a kind under a tokenizer's chat template."""
    return SkillFormat(kind, template_hash(effective_template(tokenizer)) if kind == "chat" else "")


def template_hash(template: str) -> str:
    return hashlib.sha256(template.encode()).hexdigest()[:12]


@cache
def builtin_template(name: str) -> str:
    """Return the text of a template that ships with the package."""
    return files("dylora_mlx.data").joinpath(f"templates/{name}.jinja").read_text(encoding="utf-8").strip()


def set_template(tokenizer: Any) -> str | None:
    """Return the hash of a template that was set in place of the tokenizer's own; None if there is none. Loads nothing."""
    template = getattr(tokenizer, "template_override", None)
    return None if template is None else template_hash(template)


def effective_template(tokenizer: TextTokenizer) -> str:
    """Return the tokenizer's chat template, or the default one if it has none."""
    return tokenizer.chat_template or builtin_template(DEFAULT_TEMPLATE)


# Text of samples


def render(sample: Sample, tokenizer: TextTokenizer, location: str) -> list[RenderedText]:
    """Return the documents of a sample: one, or one for each assistant turn under a template that rewrites earlier turns.

    Raises UserError, prefixed with `location`, for a chat that the template refuses or does not show in full.
    """
    if isinstance(sample, Plain):
        text = strip_ends(sample.text, tokenizer)
        return [RenderedText(text, [(0, len(text))])]
    if isinstance(sample, PromptCompletion):
        prompt = strip_ends(sample.prompt, tokenizer, end=False)
        text, start = prompt + strip_ends(sample.completion, tokenizer, begin=False), len(prompt)
        return [RenderedText(text, [(0 if sample.learn_prompt else start, len(text))], [start])]
    return _ChatRenderer(sample, tokenizer, location).documents()


def chat_prompt(
    messages: list[Message], tokenizer: TextTokenizer, tools: list[Any] | None = None, location: str = "the prompt"
) -> str:
    """Return the prompt for the next assistant turn after `messages`.

    It is the template's own generation prompt. A template without one gets the header that it writes before an
    assistant's content. Raises UserError, prefixed with `location`, for messages that the template refuses.
    """
    return _ChatRenderer(Chat(messages, [False] * len(messages), tools), tokenizer, location).prompt(len(messages))


def end_marker(tokenizer: TextTokenizer) -> str:
    """Return the text that the chat template writes after an assistant's content, such as <end_of_turn>; may be empty."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PLACEHOLDER_CONTENT}]
    text = _ChatRenderer(Chat(messages, [False, True]), tokenizer, "the chat template").text(2)
    return text.rpartition(_PLACEHOLDER_CONTENT)[2].strip()


class _ChatRenderer:
    """Renders the beginnings of one chat. Position n stands for the first n messages."""

    def __init__(self, chat: Chat, tokenizer: TextTokenizer, location: str):
        self.tokenizer, self.location = tokenizer, location
        self.template = effective_template(tokenizer)
        self.chat = chat._replace(messages=[_without_end(message, tokenizer) for message in chat.messages])

    def text(self, count: int, generation_prompt: bool = False, last: Message | None = None) -> str:
        """Render the first `count` messages, or those before with `last` in place of message number `count`."""
        return self._apply(self.template, count, generation_prompt, last)

    def _apply(self, template: str, count: int, generation_prompt: bool = False, last: Message | None = None) -> str:
        messages = self.chat.messages[:count] if last is None else [*self.chat.messages[: count - 1], last]
        try:
            return self.tokenizer.apply_template(template, messages, self.chat.tools, generation_prompt)
        except UserError:
            raise
        except Exception as error:  # templates raise errors of their own for roles and orders they do not support
            reason = " ".join(str(error).split())[:200]
            place = f"{self.location}, message {self._first_refused(template, count)}"
            raise UserError(f"{place}: the chat template refuses it ({reason})") from error

    def _first_refused(self, template: str, count: int) -> int:
        """Return the number of messages at which the template begins to raise."""
        for number in range(1, count):
            try:
                self.tokenizer.apply_template(template, self.chat.messages[:number], self.chat.tools, False)
            except Exception:
                return number
        return count

    def prompt(self, count: int) -> str:
        """Return the prompt for message number `count` + 1."""
        prompt_text = self.text(count, generation_prompt=True)
        plain = self.text(count)
        if prompt_text != plain:
            return prompt_text
        answer = {"role": "assistant", "content": _PLACEHOLDER_CONTENT}
        answered = self.text(count + 1, last=answer)
        if not answered.startswith(plain) or _PLACEHOLDER_CONTENT not in answered:
            return plain
        header = answered[len(plain) : answered.index(_PLACEHOLDER_CONTENT)].rstrip(" ")
        # Blanks alone belong to the answer: tokenizers join them with its first word.
        return plain + header if header.strip() else plain

    def documents(self) -> list[RenderedText]:
        learned = [number for number, flag in enumerate(self.chat.learned) if flag]
        # A first turn by the assistant is context: it has no prompt before it.
        answers = [number for number in learned if number and _is_answer(self.chat.messages[number])]
        if not answers:
            return []
        self._check_tools(answers[0])
        turns = [self._turn(number) for number in answers]
        for number, turn in zip(answers, turns, strict=True):
            self._check_complete(number, turn)
        # The last answer's text holds all earlier turns, unless the template rewrites them once others follow.
        last_turn = turns[-1]
        if all(last_turn.text.startswith(turn.text[: turn.learned[0][1]]) for turn in turns):
            spans = [turn.learned[0] for turn in turns]
            merged = RenderedText(last_turn.text, spans, [start for start, _ in spans], special=False)
            # Where a token crosses from a prompt into an answer, a later turn would see other ids than generation gives it.
            turns = turns if crossed(merged, self.tokenizer) else [merged]
        if any(self.chat.messages[number]["role"] != "assistant" for number in learned):  # prompts are learned too
            return [RenderedText(t.text, [(0, len(t.text))], t.asked, special=False) for t in turns]
        return turns

    def _turn(self, number: int) -> RenderedText:
        """Render the messages up to assistant message `number`, whose content and end marker are learned."""
        if _GENERATION_TAG.search(self.template):
            return self._tagged_turn(number)
        text, prompt = self.text(number + 1), self.prompt(number)
        if not text.startswith(prompt):
            # The prompt opens something that a rendered turn lacks, such as <think>. Generation uses this prompt, so
            # training does too.
            start = self._content_start(number, text)
            if start < 0:
                raise UserError(
                    f"{self.location}, message {number + 1}: the chat template writes this turn in another way than it "
                    "asks for it, so no loss mask can be made; mark the answers in the template with {% generation %}"
                )
            text = prompt + text[start:]
        end = max(len(text.rstrip()), len(prompt))
        return RenderedText(text[:end], [(len(prompt), end)], [len(prompt)], special=False)

    def _content_start(self, number: int, text: str) -> int:
        """Return the position of message `number`'s content in its rendered text; -1 if it cannot be located."""
        rendered = self.text(number + 1, last={**self.chat.messages[number], "content": _PLACEHOLDER_CONTENT})
        start = rendered.find(_PLACEHOLDER_CONTENT)
        return start if start >= 0 and rendered[:start] == text[:start] else -1

    def _tagged_turn(self, number: int) -> RenderedText:
        """As `_turn`, for a template that marks answers by {% generation %}."""
        marked = _GENERATION_TAG.sub(_sentinel, self.template)
        text = self._apply(marked, number + 1)
        start, end = text.rfind(_BEGIN), text.rfind(_END)
        if start < 0 or end < start:
            raise UserError(
                f"{self.location}, message {number + 1}: the chat template's generation tags do not mark it"
            )
        before = text[:start].replace(_BEGIN, "").replace(_END, "")
        # Tags often leave out the end marker, which ends the answer all the same.
        answer = text[start + 1 :].replace(_BEGIN, "").replace(_END, "").rstrip()
        prompt = self.prompt(number)
        if before.startswith(prompt):  # the tag begins after the prompt ends: the text between is the answer's
            before, answer = prompt, before[len(prompt) :] + answer
        elif prompt.startswith(before):  # the prompt opens something that a rendered turn lacks, such as <think>
            before = prompt
        else:
            raise UserError(
                f"{self.location}, message {number + 1}: the chat template asks in another way than its generation tags "
                "mark the answer"
            )
        span = (len(before), len(before) + len(answer))
        return RenderedText(before + answer, [span], [span[0]], special=False)

    def _check_complete(self, number: int, turn: RenderedText) -> None:
        """Check that an answer's text holds the message's content, reasoning and tool calls, and that the messages before
        it are shown. Templates leave out silently what they do not know."""
        message, (start, end) = self.chat.messages[number], turn.learned[0]
        place, answer = f"{self.location}, message {number + 1}", _squash(turn.text[start:end])
        if _squash(message["content"]) not in answer:
            raise UserError(f"{place}: the chat template leaves out part of the assistant's content")
        for name in ("reasoning_content", "thinking"):
            if _squash(str(message.get(name, ""))) not in answer:
                raise UserError(
                    f"{place}: the chat template does not write {name}; remove it from the records, or name a template that "
                    "writes it with data.chat_template"
                )
        calls = message.get("tool_calls", [])
        full_text = self.text(number + 1) if calls else ""
        for i, call in enumerate(calls):
            rest = [*calls[:i], *calls[i + 1 :]]
            fewer = {**message, "tool_calls": rest} if rest else {k: v for k, v in message.items() if k != "tool_calls"}
            without = self._try_text(number + 1, fewer)
            if without == full_text or tool_name(call) not in answer:
                raise UserError(
                    f"{place}: the chat template does not write tool calls{' beyond the first' if i else ''}; choose a base "
                    "whose template does, or name a template with data.chat_template"
                )
        context = _squash(turn.text[:start])
        for earlier, before in enumerate(self.chat.messages[:number]):
            if before["role"] != "assistant" and _squash(before["content"]) not in context:
                raise UserError(
                    f"{self.location}, message {earlier + 1}: the chat template leaves out the content of the role "
                    f"'{before['role']}'; remove the message, or name a template that writes it with data.chat_template"
                )

    def _try_text(self, count: int, last: Message) -> str | None:
        """Return the text with another last message; None if the template refuses it."""
        try:
            return self.text(count, last=last)
        except UserError:
            return None

    def _check_tools(self, number: int) -> None:
        """Check that the text before message `number` changes with each tool that the record defines."""
        tools = self.chat.tools or []
        full_text = self.text(number) if tools else ""
        for i, tool in enumerate(tools):
            rest = [*tools[:i], *tools[i + 1 :]] or None
            fewer = _ChatRenderer(self.chat._replace(tools=rest), self.tokenizer, self.location).text(number)
            if fewer == full_text or tool_name(tool) not in full_text:
                raise UserError(
                    f"{self.location}, message {number + 1}: the chat template does not write tools; choose a base whose "
                    "template does, or name a template with data.chat_template"
                )


def _without_end(message: Message, tokenizer: TextTokenizer) -> Message:
    """Return an assistant's message without the EOS that its content may end with: the template writes the end."""
    if message["role"] != "assistant":
        return message
    return {**message, "content": strip_ends(message["content"], tokenizer, begin=False)}


def _is_answer(message: Message) -> bool:
    """Return whether a message is an assistant's and has content. An end marker alone is never learned."""
    content = message["content"].strip() or any(
        message.get(name) for name in ("tool_calls", "reasoning_content", "thinking")
    )
    return message["role"] == "assistant" and bool(content)


def _sentinel(tag: re.Match[str]) -> str:
    """Return a Jinja expression that writes a mark in place of a generation tag, with the tag's control of blanks."""
    return "{{" + tag[1] + f" '{_END if tag[2] else _BEGIN}' " + tag[3] + "}}"


def strip_ends(text: str, tokenizer: TextTokenizer, begin: bool = True, end: bool = True) -> str:
    """Return a text without the BOS that it begins with and the EOS that it ends with: `encode` adds one of each."""
    if begin and (first := _alternatives(tokenizer, [tokenizer.bos_token_id])):
        text = re.sub(rf"^\s*(?:{first})+", "", text)
    if end and (last := _alternatives(tokenizer, tokenizer.eos_token_ids)):
        text = re.sub(rf"(?:\s*(?:{last}))+\s*$", "", text)
    return text


def _alternatives(tokenizer: TextTokenizer, ids: Sequence[int]) -> str:
    return "|".join(re.escape(token) for token in tokenizer.token_texts(ids) if token)


def _squash(text: str) -> str:
    return "".join(text.split())
