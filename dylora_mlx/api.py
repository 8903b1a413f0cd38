"""The library: what the commands do, for notebooks and programs. Mistakes raise UserError, with one line each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.cli.parser import check_run_name
from dylora_mlx.config import Config, Source
from dylora_mlx.config.load import config_from_files
from dylora_mlx.config.yaml_files import find_config
from dylora_mlx.errors import UserError
from dylora_mlx.evaluation.losses import DomainLosses, domain_losses, evaluation_domains
from dylora_mlx.exporting import formats
from dylora_mlx.generation import stream
from dylora_mlx.generation.session import GenerationSettings, Session
from dylora_mlx.generation.stream import GenerationSummary, Sampling, TextPiece
from dylora_mlx.model.base import device
from dylora_mlx.run import loop, run_folder
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.system import console, palette
from dylora_mlx.system.files import read_json
from dylora_mlx.training.run import TrainingRun as Training
from dylora_mlx.training.summary import document_gates, token_texts


class RoutedText(NamedTuple):
    """A text as the router sees it. tokens: texts of its tokens [L]; gates: float32 [L, E], of the position that predicts
    each token; names: of the E columns, the base's first."""

    tokens: list[str]
    gates: np.ndarray
    names: list[str]

    @property
    def experts(self) -> list[str]:
        """The likeliest expert of each token."""
        return [self.names[expert_id] for expert_id in self.gates.argmax(-1)]

    @property
    def shares(self) -> dict[str, float]:
        """Mean gate by name, the largest first."""
        mean = self.gates.mean(0)
        return {self.names[int(expert_id)]: float(mean[expert_id]) for expert_id in np.argsort(-mean)}

    def _repr_html_(self) -> str:
        expert_ids, strength = self.gates.argmax(-1), self.gates.max(-1)
        text = "".join(
            f'<span title="{escape(self.names[c])} {g:.2f}" style="{_tint(int(c))}">{escape(token)}</span>'
            for token, c, g in zip(self.tokens, expert_ids, strength, strict=True)
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
    summary: GenerationSummary

    def __str__(self) -> str:
        return self.text


class Run:
    """What a run folder has learned. Made by `load` and `learn`."""

    def __init__(self, folder: Path, opened: OpenedRun):
        self.folder, self._opened = folder, opened

    @property
    def config(self) -> Config:
        return self._opened.config

    @property
    def experts(self) -> dict[str, dict[str, Any]]:
        """Of every expert by name: its gate column, rank, alpha, skills, and whether it is frozen."""
        named, held = formats.expert_names(self._opened.pool), self._opened.library.experts_of
        found = {}
        for expert_id, record in enumerate(self._opened.pool.describe(), 1):
            skills = [skill for skill, owner in held.items() if owner == expert_id]
            kept = {name: record[name] for name in ("rank", "alpha", "frozen")}
            found[named[expert_id]] = {"expert_id": expert_id, **kept, "skills": skills}
        return found

    @cached_property
    def results(self) -> dict[str, Any]:
        """results.json: matrix, continual-learning metrics, test losses. Raises UserError for an unfinished run."""
        return read_json(self.folder / "results.json")

    def route(self, text: str) -> RoutedText:
        """Which expert each token of a text goes to, once all are mature. Raises UserError for an empty text and for one
        that is longer than the base's context."""
        base = self._opened.base
        ids = stream.encode_prompt(base.tokenizer, text)
        if len(ids) < 2:
            raise UserError("the text is empty; there is nothing to route")
        if len(ids) > base.context_length:
            raise UserError(f"the text has {len(ids)} tokens, the base reads {base.context_length} at most; shorten it")
        gates = document_gates(self._opened.model, self.config.growth, ids[:-1])
        return RoutedText(token_texts(base.tokenizer, ids[1:].tolist()), gates, formats.expert_names(self._opened.pool))

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
    ) -> Iterator[TextPiece | GenerationSummary]:
        """Pieces of a continuation as they come, then a summary.

        routing: experts for every token, or once for the prompt; expert: a name, a number or "base", for everything. Raises
        UserError for a prompt that is too long and an expert that there is none of.
        """
        if seed is not None:
            mx.random.seed(seed)
        sampling = Sampling(temperature, top_p, min_p, top_k, repetition_penalty)
        session = Session(self._opened, GenerationSettings(max_tokens, routing, expert, sampling, stop))
        ids = session.tokens(prompt)
        yield from session.answer(prompt, ids, session.prompt_gates(ids))

    def generate(self, prompt: str, max_tokens: int = 256, **options: Any) -> Generated:
        """A continuation as a whole; the options are those of `stream`."""
        names, text, counts, summary = formats.expert_names(self._opened.pool), "", {}, None
        for piece in self.stream(prompt, max_tokens, **options):
            if isinstance(piece, GenerationSummary):
                summary = piece
                continue
            text += piece.text
            if piece.expert_id is not None:
                counts[names[piece.expert_id]] = counts.get(names[piece.expert_id], 0) + 1
        assert summary is not None
        return Generated(text, counts, summary)

    def losses(
        self, data: Mapping[str, str] | None = None, split: Literal["validation", "test"] = "test"
    ) -> dict[str, DomainLosses]:
        """Losses in nats a token of the base, the mixture and every expert, by domain: the run's own, and further ones as
        name -> source. Raises UserError for a source that cannot be read."""
        further = [f"{name}={source}" for name, source in (data or {}).items()]
        return dict(domain_losses(self._opened, evaluation_domains(self._opened.config, further), split))

    def add_skill(self, source: str, name: str, *, quiet: bool = False, **options: Any) -> Run:
        """Teach one more skill; return the run as it is then. The folder keeps the earlier state in checkpoints/before-NAME.

        source: packaged/NAME, a .jsonl file, a folder, or a hub data set; options: of `Source`, such as preset or rank.
        """
        try:
            wanted = Source(name=name, source=source, **options)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
        return _trained(lambda: run_folder.extend_run(self.folder, wanted), quiet)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{each['expert_id']}</td><td>{escape(name)}</td><td>{escape(', '.join(each['skills']))}</td>"
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
    device.set_memory_limits()
    return Run(Path(folder), run_folder.open_run(Path(folder), whole=False))


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
    else:
        path = find_config(str(config))
        name = path.stem if name is None else name
        config = config_from_files([path], {option: str(value) for option, value in (options or {}).items()})
    folder = Path(runs_folder) / check_run_name(name)
    return _trained(lambda: run_folder.start_run(config, folder), quiet)


def _trained(begin: Callable[[], Training], quiet: bool) -> Run:
    with console.output_mode("quiet" if quiet else "text"):
        run = begin()
        loop.learn_stream(run)
    return load(run.folder)


def _tint(expert_id: int) -> str:
    """A background that text in a light or dark notebook can be read on."""
    return "background:rgba({},{},{},0.27)".format(*palette.rgb(expert_id)) if expert_id else ""
