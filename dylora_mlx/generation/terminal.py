"""Answers in a terminal or a pipe: as they come, coloured by expert, alone, or as JSON."""

from __future__ import annotations

import json
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape

from dylora_mlx.errors import UserError
from dylora_mlx.generation.session import Session
from dylora_mlx.generation.stream import GenerationSummary
from dylora_mlx.system import palette


class OutputStyle(NamedTuple):
    """coloured: each token by its likeliest expert; quiet: the text alone; json: an object for each prompt."""

    coloured: bool = False
    quiet: bool = False
    json: bool = False


class Answer(NamedTuple):
    """What one prompt came to: the text, tokens by expert, and figures."""

    text: str
    experts: dict[str, int]
    summary: GenerationSummary


def print_answer(session: Session, prompt: str, look: OutputStyle, console: Console) -> Answer:
    """Print an answer as it comes."""
    shown, counts, summary = "", dict.fromkeys(session.names, 0), None
    ids = session.tokens(prompt)
    gates = session.prompt_gates(ids)
    if gates is not None and session.forced is None and not look.quiet and not look.json:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in session.gate_shares(gates).items())
        console.print(f"experts for this prompt: {shares}", style="dim", markup=False)
    for piece in session.answer(prompt, ids, gates):
        if isinstance(piece, GenerationSummary):
            summary = piece
            continue
        shown += piece.text
        if piece.expert_id is not None:
            counts[session.names[piece.expert_id]] += 1
        if not look.json:
            color = palette.terminal_color(piece.expert_id) if look.coloured else "default"
            text = escape(piece.text)
            console.print(text if color == "default" else f"[{color}]{text}[/{color}]", end="")
    assert summary is not None
    if not look.json:
        console.print()
    return Answer(shown, {name: count for name, count in counts.items() if count}, summary)


def print_summary(session: Session, result: Answer, look: OutputStyle, console: Console) -> None:
    """The figures after an answer."""
    if look.json:
        print(json.dumps({"text": result.text, "experts": result.experts, **result.summary._asdict()}))
        return
    if look.quiet:
        return
    found = result.summary
    if result.experts:
        parts = []
        for name, count in sorted(result.experts.items(), key=lambda item: -item[1]):
            color = palette.terminal_color(session.names.index(name))
            shown = f"{escape(name)} {count}"
            parts.append(f"[{color}]{shown}[/{color}]" if look.coloured else shown)
        console.print("tokens by their likeliest expert: " + ", ".join(parts))
    console.print(
        f"prompt {found.prompt_tokens} tokens, {found.prompt_speed:.0f} a second; text {found.tokens} tokens, "
        f"{found.speed:.0f} a second; peak memory {found.peak_memory:.2f} GB",
        style="dim",
    )


def chat(session: Session, look: OutputStyle, console: Console) -> None:
    """A prompt at a time until the end of input."""
    kind = "a conversation" if session.uses_chat_template else "each prompt by itself (this base has no chat template)"
    console.print(f"{kind}; an empty line or Ctrl-D ends it, /new begins anew", style="dim", markup=False)
    while True:
        try:
            prompt = console.input("[bold]>>> [/bold]")
        except EOFError:
            console.print()
            return
        if not prompt.strip():
            return
        if prompt.strip() == "/new":
            session.messages = []
            continue
        try:
            print_summary(session, print_answer(session, prompt, look, console), look, console)
        except UserError as error:
            console.print(f"error: {error}", style="red", markup=False)
