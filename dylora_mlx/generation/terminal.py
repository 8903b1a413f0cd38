"""Answers in a terminal or a pipe: as they come, coloured by expert, alone, or as JSON."""

from __future__ import annotations

import json
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape

from dylora_mlx.errors import UserError
from dylora_mlx.generation.session import Session
from dylora_mlx.generation.stream import Summary

COLOURS = ("default", "cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta",
           "bright_green", "bright_yellow", "bright_blue", "bright_red")  # fmt: skip
"""Of the base, column 0, and of the experts in turn."""


class Look(NamedTuple):
    """coloured: each token by its likeliest expert; quiet: the text alone; json: an object for each prompt."""

    coloured: bool = False
    quiet: bool = False
    json: bool = False


class Result(NamedTuple):
    """What one prompt came to: the text, tokens by expert, and figures."""

    text: str
    experts: dict[str, int]
    summary: Summary


def respond(session: Session, prompt: str, look: Look, console: Console) -> Result:
    """Print an answer as it comes."""
    shown, counts, summary = "", dict.fromkeys(session.names, 0), None
    ids = session.tokens(prompt)
    gates = session.constant(ids)
    if gates is not None and session.forced is None and not look.quiet and not look.json:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in session.shares(gates).items())
        console.print(f"experts for this prompt: {shares}", style="dim", markup=False)
    for piece in session.answer(prompt, ids, gates):
        if isinstance(piece, Summary):
            summary = piece
            continue
        shown += piece.text
        if piece.column is not None:
            counts[session.names[piece.column]] += 1
        if not look.json:
            colour = COLOURS[piece.column % len(COLOURS)] if look.coloured and piece.column is not None else "default"
            text = escape(piece.text)
            console.print(text if colour == "default" else f"[{colour}]{text}[/{colour}]", end="")
    assert summary is not None
    if not look.json:
        console.print()
    return Result(shown, {name: count for name, count in counts.items() if count}, summary)


def close(session: Session, result: Result, look: Look, console: Console) -> None:
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
            colour = COLOURS[session.names.index(name) % len(COLOURS)]
            shown = f"{escape(name)} {count}"
            parts.append(f"[{colour}]{shown}[/{colour}]" if look.coloured else shown)
        console.print("tokens by their likeliest expert: " + ", ".join(parts))
    console.print(
        f"prompt {found.prompt_tokens} tokens, {found.prompt_speed:.0f} a second; text {found.tokens} tokens, "
        f"{found.speed:.0f} a second; peak memory {found.peak_memory:.2f} GB",
        style="dim",
    )


def talk(session: Session, look: Look, console: Console) -> None:
    """A prompt at a time until the end of input."""
    kind = "a conversation" if session.templated else "each prompt by itself (this base has no chat template)"
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
            close(session, respond(session, prompt, look, console), look, console)
        except UserError as error:
            console.print(f"error: {error}", style="red", markup=False)
