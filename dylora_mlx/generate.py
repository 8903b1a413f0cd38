"""Continue a prompt, or chat, with what a run has learned."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.markup import escape

from dylora_mlx import cli
from dylora_mlx.errors import UserError
from dylora_mlx.generation import decode, stream
from dylora_mlx.generation.decode import TokenRouted
from dylora_mlx.generation.stream import Piece, Sampling, Summary
from dylora_mlx.model import device
from dylora_mlx.model.router import Routing
from dylora_mlx.runs import Opened, open_run
from dylora_mlx.share import formats

EXAMPLES = """examples:
  python -m dylora_mlx.generate runs/quickstart --prompt "SELECT" --temp 0.7
  python -m dylora_mlx.generate runs/quickstart --prompt "import flask" --show-experts
  python -m dylora_mlx.generate runs/quickstart --expert sql --prompt "-- Orders of each customer"
  python -m dylora_mlx.generate runs/quickstart --routing prompt -p "..."    decodes at the cost of the base
  cat prompt.txt | python -m dylora_mlx.generate runs/quickstart --quiet
  python -m dylora_mlx.generate runs/quickstart                              a prompt at a time, in a terminal
"""
COLOURS = ("default", "cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta",
           "bright_green", "bright_yellow", "bright_blue", "bright_red")  # fmt: skip
"""Of the base, column 0, and of the experts in turn."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dylora_mlx.generate", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("run", type=Path, help="a run folder")
    add("--prompt", "-p", help="the prompt; without one, what comes in through a pipe, or one at a time in a terminal")
    add("--max-tokens", "-m", type=int, default=256, help="tokens to generate at most (256)")
    add("--routing", choices=["token", "prompt"], default="token",
        help="experts chosen for every token, or once for the prompt and folded in")  # fmt: skip
    add("--expert", metavar="NAME", help="this expert for everything: a skill's name, a number, or base")
    add("--temp", type=float, default=0.0, help="sampling temperature; 0, the default, is greedy")
    add("--top-p", type=float, default=0.0, help="sample from the likeliest tokens of this probability together")
    add("--min-p", type=float, default=0.0, help="sample from tokens at least this likely, relative to the likeliest")
    add("--top-k", type=int, default=0, help="sample from this many tokens")
    add("--repetition-penalty", type=float, help="penalise the last 20 tokens")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text (may be repeated)")
    add("--seed", type=int, help="seed of the sampling")
    add("--show-experts", action="store_true", help="colour each token by its likeliest expert")
    add("--ignore-chat-template", action="store_true", help="give the prompt as it is, even if there is a template")
    add("--quiet", "-q", action="store_true", help="print the text alone")
    add("--json", action="store_true", help="print one JSON object a prompt: text, experts, tokens, speed")
    options = parser.parse_args(argv)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    bounds = {
        "--max-tokens": options.max_tokens >= 1,
        "--temp": options.temp >= 0,
        "--top-p": 0 <= options.top_p <= 1,
        "--min-p": 0 <= options.min_p <= 1,
        "--top-k": options.top_k >= 0,
        "--repetition-penalty": options.repetition_penalty is None or options.repetition_penalty > 0,
    }
    for name, good in bounds.items():
        if not good:
            raise UserError(f"{name} {getattr(options, name[2:].replace('-', '_'))}: out of its range")
    if options.show_experts and (options.json or options.quiet):
        raise UserError("--show-experts colours text for people; leave out --quiet and --json")


class Result(NamedTuple):
    """What one prompt came to: the text, tokens by expert, and figures."""

    text: str
    experts: dict[str, int]
    summary: Summary


class Session:
    """A run, ready to answer prompts."""

    def __init__(self, run: Opened, options: argparse.Namespace):
        self.run, self.options = run, options
        self.names = formats.named(run)
        how = formats.mixing(run)
        self.routing = Routing(how.top_k, mx.array(how.temperature))
        self.sampling = Sampling(options.temp, options.top_p, options.min_p, options.top_k, options.repetition_penalty)
        self.messages: list[dict[str, str]] = []
        self.forced = self._forced(options.expert)
        if options.routing == "token" and self.forced is None and run.model.composition != "layers":
            raise UserError(
                "model.composition: logits has no caches to generate with; use --routing prompt or --expert"
            )

    def _forced(self, name: str | None) -> int | None:
        if name is None:
            return None
        return 0 if name == formats.NULL else formats.column_of(self.run, name)

    @property
    def templated(self) -> bool:
        return not self.options.ignore_chat_template and self.run.base.tokenizer.chat_template is not None

    def tokens(self, prompt: str) -> np.ndarray:
        """Token ids of a prompt, by the chat template where there is one. Raises UserError for one that is too long."""
        tokenizer = self.run.base.tokenizer
        if self.templated:
            messages = [*self.messages, {"role": "user", "content": prompt}]
            chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
            found = np.array(chat, np.int32)
        else:
            found = stream.encode(tokenizer, prompt)
        context = self.run.base.context
        if len(found) >= context:
            raise UserError(f"the prompt has {len(found)} tokens, the base reads {context} at most; shorten it")
        return found

    def answer(self, prompt: str, ids: np.ndarray, gates: np.ndarray | None) -> Iterator[Piece | Summary]:
        """Pieces of text as they come, then a summary. ids, gates: of the prompt, from `tokens` and `constant`."""
        room = min(self.options.max_tokens, self.run.base.context - len(ids))
        if gates is None:
            place: Any = nullcontext(TokenRouted(self.run.model, self.routing))
        else:
            place = decode.folded(self.run.base, self.run.model, gates)
        text = ""
        with place as model:
            tokenizer = self.run.base.tokenizer.loaded
            for piece in stream.stream(model, tokenizer, ids, room, self.sampling, self.options.stop):
                text += piece.text if isinstance(piece, Piece) else ""
                yield piece
        if self.templated:
            self.messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]

    def constant(self, ids: np.ndarray) -> np.ndarray | None:
        """Gates [E] for the whole text; None where every token has its own."""
        if self.forced is not None:
            return np.eye(len(self.names), dtype=np.float32)[self.forced]
        if self.options.routing == "prompt":
            return decode.prompt_gates(self.run.model, ids, self.routing)
        return None

    def told(self, gates: np.ndarray | None) -> str:
        """Which experts a whole prompt gets, in words; empty where every token has its own, or all go to one."""
        if gates is None or self.forced is not None:
            return ""
        order = [int(c) for c in np.argsort(-gates) if gates[c] > 0.005]
        return "experts for this prompt: " + ", ".join(f"{self.names[c]} {gates[c]:.0%}" for c in order)


def respond(session: Session, prompt: str, console: Console) -> Result:
    """Print an answer as it comes, in the way that was asked for."""
    options = session.options
    shown, counts, summary = "", dict.fromkeys(session.names, 0), None
    ids = session.tokens(prompt)
    gates = session.constant(ids)
    if not options.quiet and not options.json and (told := session.told(gates)):
        console.print(told, style="dim", markup=False)
    for piece in session.answer(prompt, ids, gates):
        if isinstance(piece, Summary):
            summary = piece
            continue
        shown += piece.text
        if piece.column is not None:
            counts[session.names[piece.column]] += 1
        if not options.json:
            colour = (
                COLOURS[piece.column % len(COLOURS)] if options.show_experts and piece.column is not None else "default"
            )
            console.print(
                f"[{colour}]{escape(piece.text)}[/{colour}]" if colour != "default" else escape(piece.text), end=""
            )
    assert summary is not None
    if not options.json:
        console.print()
    return Result(shown, {name: count for name, count in counts.items() if count}, summary)


def close(session: Session, result: Result, console: Console) -> None:
    """The figures after an answer."""
    if session.options.json:
        print(json.dumps({"text": result.text, "experts": result.experts, **result.summary._asdict()}))
        return
    if session.options.quiet:
        return
    found = result.summary
    if result.experts:
        parts = []
        for name, count in sorted(result.experts.items(), key=lambda item: -item[1]):
            colour = COLOURS[session.names.index(name) % len(COLOURS)]
            shown = f"{escape(name)} {count}"
            parts.append(f"[{colour}]{shown}[/{colour}]" if session.options.show_experts else shown)
        console.print("tokens by their likeliest expert: " + ", ".join(parts))
    console.print(
        f"prompt {found.prompt_tokens} tokens, {found.prompt_speed:.0f} a second; text {found.tokens} tokens, "
        f"{found.speed:.0f} a second; peak memory {found.peak_memory:.2f} GB",
        style="dim",
    )


def talk(session: Session, console: Console) -> None:
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
            close(session, respond(session, prompt, console), console)
        except UserError as error:
            console.print(f"error: {error}", style="red", markup=False)


def command(argv: list[str]) -> int:
    options = parse(argv)
    prompt = options.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise UserError("the prompt is empty; give one with --prompt or through a pipe")
    console = Console(highlight=False, soft_wrap=True)
    run = open_run(options.run)
    device.prepare()
    if options.seed is not None:
        mx.random.seed(options.seed)
    session = Session(run, options)
    if prompt is None:
        talk(session, console)
        return 0
    close(session, respond(session, prompt, console), console)
    return 0


def main(argv: list[str] | None = None) -> int:
    return cli.guarded(command, argv)


if __name__ == "__main__":
    sys.exit(main())
