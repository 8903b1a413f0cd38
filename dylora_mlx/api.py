"""The library: what the commands do, for notebooks and programs. Mistakes raise UserError, with one line each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.cli import options as cli
from dylora_mlx.cli import parser as commands
from dylora_mlx.config import Config, Source
from dylora_mlx.errors import UserError
from dylora_mlx.evaluation import losses as measured
from dylora_mlx.evaluation.losses import Losses
from dylora_mlx.exporting import formats
from dylora_mlx.generation import stream
from dylora_mlx.generation.session import Session, Settings
from dylora_mlx.generation.stream import Piece, Sampling, Summary
from dylora_mlx.model.base import device
from dylora_mlx.run import folder as runs
from dylora_mlx.run import loop
from dylora_mlx.run.folder import Opened
from dylora_mlx.system import console
from dylora_mlx.system.files import read_json
from dylora_mlx.training import summary as samples
from dylora_mlx.training.run import Run as Training

HUES = ("none", "#0891b2", "#c026d3", "#16a34a", "#ca8a04", "#2563eb", "#dc2626", "#0d9488", "#7c3aed", "#65a30d")
"""Of the base, column 0, and of the experts in turn."""


class Routed(NamedTuple):
    """A text as the router sees it. tokens: texts of its tokens [L]; gates: float32 [L, E], of the position that predicts
    each token; names: of the E columns, the base's first."""

    tokens: list[str]
    gates: np.ndarray
    names: list[str]

    @property
    def experts(self) -> list[str]:
        """The likeliest expert of each token."""
        return [self.names[column] for column in self.gates.argmax(-1)]

    @property
    def shares(self) -> dict[str, float]:
        """Mean gate by name, the largest first."""
        mean = self.gates.mean(0)
        return {self.names[int(column)]: float(mean[column]) for column in np.argsort(-mean)}

    def _repr_html_(self) -> str:
        columns, strength = self.gates.argmax(-1), self.gates.max(-1)
        text = "".join(
            f'<span title="{escape(self.names[c])} {g:.2f}" style="{_tint(int(c))}">{escape(token)}</span>'
            for token, c, g in zip(self.tokens, columns, strength, strict=True)
        )
        shares = ", ".join(
            f'<span style="{_tint(self.names.index(name))}">{escape(name)}</span> {share:.0%}'
            for name, share in self.shares.items()
        )
        return f'<pre style="white-space:pre-wrap">{text}</pre><p>{shares}</p>'


class Generated(NamedTuple):
    """A continuation. experts: tokens by their likeliest expert, where each token has its own; summary: counts, speed, and
    why it ended."""

    text: str
    experts: dict[str, int]
    summary: Summary

    def __str__(self) -> str:
        return self.text


class Run:
    """What a run folder has learned. Made by `load` and `learn`."""

    def __init__(self, folder: Path, opened: Opened):
        self.folder, self._opened = folder, opened

    @property
    def config(self) -> Config:
        return self._opened.config

    @property
    def experts(self) -> dict[str, dict[str, Any]]:
        """Of every expert by name: its gate column, rank, alpha, skills, and whether it is frozen."""
        named, held = formats.named(self._opened), self._opened.library.experts_of
        found = {}
        for column, record in enumerate(self._opened.pool.describe(), 1):
            skills = [skill for skill, owner in held.items() if owner == column]
            kept = {name: record[name] for name in ("rank", "alpha", "frozen")}
            found[named[column]] = {"column": column, **kept, "skills": skills}
        return found

    @cached_property
    def results(self) -> dict[str, Any]:
        """results.json: matrix, continual-learning metrics, test losses. Raises UserError for an unfinished run."""
        return read_json(self.folder / "results.json")

    def route(self, text: str) -> Routed:
        """Which expert each token of a text goes to, once all are mature. Raises UserError for an empty text and for one
        that is longer than the base's context."""
        base = self._opened.base
        ids = stream.encode(base.tokenizer, text)
        if len(ids) < 2:
            raise UserError("the text is empty; there is nothing to route")
        if len(ids) > base.context:
            raise UserError(f"the text has {len(ids)} tokens, the base reads {base.context} at most; shorten it")
        gates = samples.document_gates(self._opened.model, self.config.growth, ids[:-1])
        return Routed(samples.token_texts(base.tokenizer, ids[1:].tolist()), gates, formats.named(self._opened))

    def stream(
        self,
        prompt: str,
        max_tokens: int = 256,
        *,
        temperature: float = 0.0,
        top_p: float = 0.0,
        min_p: float = 0.0,
        top_k: int = 0,
        repetition_penalty: float | None = None,
        stop: tuple[str, ...] = (),
        routing: Literal["token", "prompt"] = "token",
        expert: str | None = None,
        seed: int | None = None,
    ) -> Iterator[Piece | Summary]:
        """Pieces of a continuation as they come, then a summary.

        routing: experts for every token, or once for the prompt; expert: a name, a number or "base", for everything. Raises
        UserError for a prompt that is too long and an expert that there is none of.
        """
        if seed is not None:
            mx.random.seed(seed)
        sampling = Sampling(temperature, top_p, min_p, top_k, repetition_penalty)
        session = Session(self._opened, Settings(max_tokens, routing, expert, sampling, stop))
        ids = session.tokens(prompt)
        yield from session.answer(prompt, ids, session.constant(ids))

    def generate(self, prompt: str, max_tokens: int = 256, **options: Any) -> Generated:
        """A continuation as a whole; the options are those of `stream`."""
        names, text, counts, summary = formats.named(self._opened), "", {}, None
        for piece in self.stream(prompt, max_tokens, **options):
            if isinstance(piece, Summary):
                summary = piece
                continue
            text += piece.text
            if piece.column is not None:
                counts[names[piece.column]] = counts.get(names[piece.column], 0) + 1
        assert summary is not None
        return Generated(text, counts, summary)

    def losses(
        self, data: Mapping[str, str] | None = None, split: Literal["validation", "test"] = "test"
    ) -> dict[str, Losses]:
        """Losses in nats a token of the base, the mixture and every expert, by domain: the run's own, and further ones as
        name -> source. Raises UserError for a source that cannot be read."""
        further = [f"{name}={source}" for name, source in (data or {}).items()]
        return dict(measured.losses(self._opened, measured.domains(self._opened, further), split))

    def add_skill(self, source: str, name: str, *, quiet: bool = False, **options: Any) -> Run:
        """Teach one more skill; return the run as it is then. The folder keeps the earlier state in checkpoints/before-NAME.

        source: packaged/NAME, a .jsonl file, a folder, or a hub data set; options: of `Source`, such as preset or rank.
        """
        try:
            wanted = Source(name=name, source=source, **options)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
        return _trained(lambda: runs.extend(self.folder, wanted), quiet)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{each['column']}</td><td>{escape(name)}</td><td>{escape(', '.join(each['skills']))}</td>"
            f"<td>{each['rank']}</td></tr>"
            for name, each in self.experts.items()
        )
        head = "<tr><th>column</th><th>expert</th><th>skills</th><th>rank</th></tr>"
        return f"<p>run <b>{escape(str(self.folder))}</b> on {escape(self._opened.base.name)}</p><table>{head}{rows}</table>"

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, experts={list(self.experts)})"


def load(folder: str | Path) -> Run:
    """What a run has learned: its final checkpoint, or its newest one.

    Raises UserError when there is no run, its checkpoint is damaged, or its base is not at hand.
    """
    device.prepare()
    return Run(Path(folder), runs.open_run(Path(folder), whole=False))


def learn(
    config: str | Path | Config,
    name: str | None = None,
    *,
    runs_folder: str | Path = "runs",
    quiet: bool = False,
    options: Mapping[str, object] | None = None,
) -> Run:
    """Train a new run, in runs_folder/name.

    config: a YAML file, a shipped config's name, or a Config, which needs a name; options: others than the file's, such as
    {"training.epochs": 5}. Raises UserError for anything wrong with them, and for a folder that exists.
    """
    if isinstance(config, Config):
        if name is None or options:
            raise UserError("a Config needs a name for its run, and takes no further options: change it by itself")
        place = Path(runs_folder) / commands.run_name(name)
        asked = cli.Options(config, place, False, cli.as_yaml(config))
    else:
        words = ["--config", str(config), "--runs", str(runs_folder), *(["--name", name] if name is not None else [])]
        asked = cli.parse(
            [*words, *(word for key, value in (options or {}).items() for word in (f"--{key}", str(value)))]
        )
    return _trained(lambda: runs.begin(asked), quiet)


def _trained(begin: Callable[[], Training], quiet: bool) -> Run:
    with console.speaking("quiet" if quiet else "text"):
        run = begin()
        loop.learn_stream(run)
    return load(run.folder)


def _tint(column: int) -> str:
    hue = HUES[column if column < len(HUES) else 1 + (column - 1) % (len(HUES) - 1)]
    return "" if hue == "none" else f"background:{hue}44"
