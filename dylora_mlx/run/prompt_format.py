"""The form of a run's prompts: the one that its skills were learned in, unless the user chooses another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dylora_mlx.data import encoding, rendering
from dylora_mlx.data.messages import Message
from dylora_mlx.data.rendering import PLAIN_FORMAT, SkillFormat
from dylora_mlx.growth.library import Library


class PromptFormat(NamedTuple):
    """Conversion of prompts to token ids, and the stop tokens of an answer."""

    asked: SkillFormat
    """The form that prompts are rendered in."""
    note: str | None = None
    """One line where no skill was learned in this form; None if all is well."""

    @property
    def is_chat(self) -> bool:
        return self.asked.kind == "chat"

    def ids(self, prompt: str, tokenizer: Any, before: Sequence[Message] = ()) -> np.ndarray:
        """Return the token ids, int32 [L], of a prompt; of a chat's next turn, after the messages `before`.

        Raises UserError for messages that the chat template refuses, and for a token that the base has no embedding of.
        """
        if not self.is_chat:
            return encoding.prompt_ids(prompt, tokenizer)
        messages = [*before, {"role": "user", "content": prompt}]
        return encoding.prompt_ids(rendering.chat_prompt(messages, tokenizer), tokenizer, special=False)

    def stops(self, tokenizer: Any) -> tuple[list[int], list[str]]:
        """Return the token ids, and the texts, that end an answer besides the base's EOS."""
        marker = rendering.end_marker(tokenizer) if self.is_chat else ""
        if not marker:
            return [], []
        ids = tokenizer.encode_text(marker)
        return (ids, []) if len(ids) == 1 else ([], [marker])


def learned_formats(library: Library, expert_id: int | None = None) -> Counter[SkillFormat]:
    """Count the forms that skills were learned in; of one expert's skills if `expert_id` is given and holds any."""
    entries = [(entry.expert, SkillFormat.parse(entry.format)) for entry in library.entries]
    known = Counter(form for expert, form in entries if form is not None and expert == expert_id)
    return known or Counter(form for expert, form in entries if form is not None and expert)


def choose_format(
    library: Library, tokenizer: Any, expert_id: int | None = None, raw: bool = False, chat: bool = False
) -> PromptFormat:
    """Choose the form of prompts: the one that the skills were learned in, a chat where they differ.

    For a run that did not record it, prompts use the base's own chat template, if it has one.

    Args:
        library: the run's library.
        tokenizer: the base's tokenizer.
        expert_id: the expert that serves everything, None for the router.
        raw: send the text alone, in whatever form the skills were learned.
        chat: render as a chat, in whatever form the skills were learned.
    """
    learned = learned_formats(library, expert_id)
    as_chat = rendering.format_of("chat", tokenizer) if chat or any(f.kind == "chat" for f in learned) else None
    if raw:
        chosen = PLAIN_FORMAT
    elif chat or as_chat:
        chosen = as_chat or PLAIN_FORMAT
    elif not learned:
        chosen = rendering.format_of("chat", tokenizer) if tokenizer.chat_template else PLAIN_FORMAT
    else:
        chosen = learned.most_common(1)[0][0]
    return PromptFormat(chosen, _note(chosen, learned))


def _note(chosen: SkillFormat, learned: Counter[SkillFormat]) -> str | None:
    if not learned or chosen in learned:
        return None
    as_chats = [form for form in learned if form.kind == "chat"]
    if chosen.kind == "chat":
        if as_chats:
            return "the skills were learned with another chat template than the one in use; answers may be poor"
        return "no skill was learned as a chat, but this prompt is asked as one; leave out --system, or use --raw"
    if len(as_chats) == len(learned):
        return "the skills were learned as chats, but this prompt is asked as raw text; leave out --raw"
    return None


def prompt_manifest(library: Library, tokenizer: Any) -> dict[str, Any]:
    """Return the prompt format for the manifest of an export, so that its runtime renders prompts in the same way.

    `kind` is plain, prompt or chat. `chat_template` is Jinja text for chats, else None. `bos_token_id` goes before other
    prompts. `eos_token_ids` and `stop` are the ids and texts that end an answer.
    """
    form = choose_format(library, tokenizer)
    ids, texts = form.stops(tokenizer)
    return {
        "kind": form.asked.kind,
        "chat_template": rendering.effective_template(tokenizer) if form.is_chat else None,
        "bos_token_id": int(tokenizer.bos_token_id),
        "eos_token_ids": [int(i) for i in dict.fromkeys([*tokenizer.eos_token_ids, *ids])],
        "stop": texts,
    }
