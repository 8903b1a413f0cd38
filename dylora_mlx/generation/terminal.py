"""Print answers in a terminal or a pipe: as they are generated, colored by expert, as bare text, or as JSON."""

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
    """The form in which answers are printed."""

    coloured: bool = False
    """Color each token by the expert with its largest gate."""
    quiet: bool = False
    """Print only the text."""
    json: bool = False
    """Print one JSON object per prompt."""


class Answer(NamedTuple):
    """The result of one prompt."""

    text: str
    experts: dict[str, int]
    """Tokens by the expert with the largest gate; empty if one set of gates serves the whole text."""
    summary: GenerationSummary


def print_answer(session: Session, prompt: str, output_style: OutputStyle, console: Console) -> Answer:
    """Print an answer as it is generated (nothing yet in JSON mode) and return it."""
    answer, counts, summary = "", dict.fromkeys(session.names, 0), None
    ids = session.tokens(prompt)
    gates = session.prompt_gates(ids)
    if gates is not None and session.forced is None and not output_style.quiet and not output_style.json:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in session.gate_shares(gates).items())
        console.print(f"experts for this prompt: {shares}", style="dim", markup=False)
    for piece in session.answer(prompt, ids, gates):
        if isinstance(piece, GenerationSummary):
            summary = piece
            continue
        answer += piece.text
        if piece.expert_id is not None:
            counts[session.names[piece.expert_id]] += 1
        if not output_style.json:
            color = palette.terminal_color(piece.expert_id) if output_style.coloured else "default"
            text = escape(piece.text)
            console.print(text if color == "default" else f"[{color}]{text}[/{color}]", end="")
    assert summary is not None
    if not output_style.json:
        console.print()
    return Answer(answer, {name: count for name, count in counts.items() if count}, summary)


def print_summary(session: Session, result: Answer, output_style: OutputStyle, console: Console) -> None:
    """Print the counts, speed and memory of an answer, or in JSON mode the whole answer."""
    if output_style.json:
        print(json.dumps({"text": result.text, "experts": result.experts, **result.summary._asdict()}))
        return
    if output_style.quiet:
        return
    figures = result.summary
    if result.experts:
        parts = []
        for name, count in sorted(result.experts.items(), key=lambda item: -item[1]):
            color = palette.terminal_color(session.names.index(name))
            label = f"{escape(name)} {count}"
            parts.append(f"[{color}]{label}[/{color}]" if output_style.coloured else label)
        console.print("tokens by their likeliest expert: " + ", ".join(parts))
    console.print(
        f"prompt {figures.prompt_tokens} tokens, {figures.prompt_speed:.0f} a second; text {figures.tokens} tokens, "
        f"{figures.speed:.0f} a second; peak memory {figures.peak_memory:.2f} GB",
        style="dim",
    )


def chat(session: Session, output_style: OutputStyle, console: Console) -> None:
    """Read prompts and print answers until an empty line or the end of input. A UserError ends only its prompt."""
    mode = "a conversation" if session.format.is_chat else "each prompt separately, as text to continue"
    console.print(f"{mode}; an empty line or Ctrl-D ends it, /new begins anew", style="dim", markup=False)
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
            print_summary(session, print_answer(session, prompt, output_style, console), output_style, console)
        except UserError as error:
            console.print(f"error: {error}", style="red", markup=False)
