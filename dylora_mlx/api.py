"""The Python API: the commands as functions for notebooks and programs. Wrong input raises UserError with a one-line message."""

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
from dylora_mlx.data import encoding
from dylora_mlx.errors import UserError
from dylora_mlx.evaluation.losses import DomainLosses, domain_losses, evaluation_domains
from dylora_mlx.exporting import formats
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
    """The router's gates for every token of a text."""

    tokens: list[str]
    """Text of each token [L]."""
    gates: np.ndarray
    """float32 [L, E]: the gates at the position that predicts each token."""
    names: list[str]
    """Names of the E gates by expert_id; the null expert (base) is first."""

    @property
    def experts(self) -> list[str]:
        """Name of the expert with the largest gate, for each token."""
        return [self.names[expert_id] for expert_id in self.gates.argmax(-1)]

    @property
    def shares(self) -> dict[str, float]:
        """Mean gate over all tokens by expert name, the largest first."""
        mean = self.gates.mean(0)
        return {self.names[int(expert_id)]: float(mean[expert_id]) for expert_id in np.argsort(-mean)}

    def _repr_html_(self) -> str:
        expert_ids, strength = self.gates.argmax(-1), self.gates.max(-1)
        text = "".join(
            f'<span title="{escape(self.names[c])} {g:.2f}" style="{_background(int(c))}">{escape(token)}</span>'
            for token, c, g in zip(self.tokens, expert_ids, strength, strict=True)
        )
        shares = ", ".join(
            f'<span style="{_background(self.names.index(name))}">{escape(name)}</span> {share:.0%}'
            for name, share in self.shares.items()
        )
        return f'<pre style="white-space:pre-wrap">{text}</pre><p>{shares}</p>'


class Generated(NamedTuple):
    """A generated continuation of a prompt."""

    text: str
    experts: dict[str, int]
    """Tokens by the expert with the largest gate; empty if the whole prompt was routed once."""
    summary: GenerationSummary
    """Token counts, speed, memory, and the reason for the end."""

    def __str__(self) -> str:
        return self.text


class Run:
    """A trained run, loaded from its folder by `load` or returned by `learn`."""

    def __init__(self, folder: Path, opened: OpenedRun):
        self.folder, self._opened = folder, opened

    @property
    def config(self) -> Config:
        return self._opened.config

    @property
    def experts(self) -> dict[str, dict[str, Any]]:
        """The experts by name: expert_id, rank, alpha, whether it is frozen, and the skills it holds."""
        names, experts_of_skill = formats.expert_names(self._opened.pool), self._opened.library.experts_of
        experts = {}
        for expert_id, record in enumerate(self._opened.pool.describe(), 1):
            skills = [skill for skill, holder in experts_of_skill.items() if holder == expert_id]
            shown_fields = {name: record[name] for name in ("rank", "alpha", "frozen")}
            experts[names[expert_id]] = {"expert_id": expert_id, **shown_fields, "skills": skills}
        return experts

    @cached_property
    def results(self) -> dict[str, Any]:
        """results.json: loss matrix, continual-learning metrics, test losses. Raises UserError for an unfinished
        run."""
        return read_json(self.folder / "results.json")

    def route(self, text: str) -> RoutedText:
        """Return the gates of every token of a text under the final (mature) routing.

        Raises UserError for an empty text and for one longer than the base's context.
        """
        base = self._opened.base
        ids = encoding.prompt_ids(text, base.tokenizer)
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
        raw: bool = False,
        system: str | None = None,
    ) -> Iterator[TextPiece | GenerationSummary]:
        """Yield pieces of a continuation as they are generated, then a summary.

        Args:
            prompt: the text to continue, or the user's message where the skills were learned as chats.
            max_tokens: maximum number of generated tokens.
            temperature, top_p, min_p, top_k, repetition_penalty: sampling as in mlx-lm; temperature 0 is greedy.
            stop: strings that end the text.
            routing: experts per token, or once for the prompt and then fused into the base.
            expert: one expert for everything: a skill's name, an expert's number, or "base".
            seed: seed of the sampling; None leaves MLX's global state.
            raw: continue the text as it is, in whatever form the skills were learned.
            system: system message; the prompt is then asked as a chat.

        Raises UserError for a prompt that is too long and for an unknown expert.
        """
        if seed is not None:
            mx.random.seed(seed)
        sampling = Sampling(temperature, top_p, min_p, top_k, repetition_penalty)
        session = Session(self._opened, GenerationSettings(max_tokens, routing, expert, sampling, stop, raw, system))
        ids = session.tokens(prompt)
        yield from session.answer(prompt, ids, session.prompt_gates(ids))

    def generate(self, prompt: str, max_tokens: int = 256, **options: Any) -> Generated:
        """Return a complete continuation. The options are those of `stream`."""
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
        """Return the losses of the base, the mixture and every expert, in nats per token, by domain.

        Args:
            data: domains beyond the run's own, as name -> source.
            split: validation or test.

        Raises UserError for a source that cannot be read.
        """
        extra_domains = [f"{name}={source}" for name, source in (data or {}).items()]
        return dict(domain_losses(self._opened, evaluation_domains(self._opened.config, extra_domains), split))

    def add_skill(self, source: str, name: str, *, quiet: bool = False, **options: Any) -> Run:
        """Train the run on one more skill and return the run with it.

        The folder keeps the earlier state in checkpoints/before-NAME.

        Args:
            source: packaged/NAME, a file, a pattern of files, a folder, or a hub data set.
            name: name of the skill.
            quiet: print only warnings and errors.
            options: fields of `Source`, such as preset or rank.

        Raises UserError for a wrong option or source, and for a run that has not finished.
        """
        try:
            skill = Source(name=name, source=source, **options)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
        return _train(lambda: run_folder.extend_run(self.folder, skill), quiet)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{expert['expert_id']}</td><td>{escape(name)}</td><td>{escape(', '.join(expert['skills']))}</td>"
            f"<td>{expert['rank']}</td></tr>"
            for name, expert in self.experts.items()
        )
        header = "<tr><th>column</th><th>expert</th><th>skills</th><th>rank</th></tr>"
        return f"<p>run <b>{escape(str(self.folder))}</b> on {escape(self._opened.base.name)}</p><table>{header}{rows}</table>"

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, experts={list(self.experts)})"


def load(folder: str | Path) -> Run:
    """Load a run from its final checkpoint, or from its newest one if it has not finished.

    Raises UserError if there is no run, its checkpoint is damaged, or its base is unavailable.
    """
    device.set_memory_limits()
    return Run(Path(folder), run_folder.open_run(Path(folder), load_experts=False))


def learn(
    config: str | Path | Config,
    name: str | None = None,
    *,
    runs_folder: str | Path = "runs",
    quiet: bool = False,
    options: Mapping[str, object] | None = None,
) -> Run:
    """Train a new run in runs_folder/name.

    Args:
        config: a YAML file, the name of a shipped config, or a Config, which needs `name`.
        name: name of the run folder; None for the config's name.
        runs_folder: parent folder of the run folder.
        quiet: print only warnings and errors.
        options: overrides of the file's options, such as {"training.epochs": 5}; not for a Config.

    Raises UserError for a mistake in any of them, and for a folder that exists.
    """
    if isinstance(config, Config):
        if name is None or options:
            raise UserError(
                "a Config needs a name for its run, and takes no further options: change the Config instead"
            )
    else:
        path = find_config(str(config))
        name = path.stem if name is None else name
        config = config_from_files([path], {option: str(value) for option, value in (options or {}).items()})
    folder = Path(runs_folder) / check_run_name(name)
    return _train(lambda: run_folder.start_run(config, folder), quiet)


def _train(start: Callable[[], Training], quiet: bool) -> Run:
    with console.output_mode("quiet" if quiet else "text"):
        run = start()
        loop.learn_stream(run)
    return load(run.folder)


def _background(expert_id: int) -> str:
    """Return a CSS background that is readable in light and dark notebooks; none for the null expert."""
    return "background:rgba({},{},{},0.27)".format(*palette.rgb(expert_id)) if expert_id else ""
