"""The Python API: the commands as functions for notebooks and programs. Wrong input raises UserError with a one-line message."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import mlx.core as mx

from dylora_mlx.cli.parser import check_run_name
from dylora_mlx.config import Config, Source
from dylora_mlx.config.load import config_from_files
from dylora_mlx.config.yaml_files import find_config
from dylora_mlx.errors import UserError
from dylora_mlx.evaluation.losses import DomainLosses, domain_losses, evaluation_domains
from dylora_mlx.exporting import formats
from dylora_mlx.generation.routed_text import RoutedText, route_text
from dylora_mlx.generation.session import GenerationSettings, Session
from dylora_mlx.generation.stream import GenerationSummary, Sampling, TextPiece, count_experts
from dylora_mlx.model.base import device
from dylora_mlx.run import loop, run_folder
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.system import console
from dylora_mlx.system.files import read_json
from dylora_mlx.training.callbacks import Callback, Callbacks
from dylora_mlx.training.run import TrainingRun as Training


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
        return route_text(self._opened, text)

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
            temperature: sampling as in mlx-lm; 0 is greedy.
            top_p: nucleus sampling, as in mlx-lm.
            min_p: minimum probability, as a share of the likeliest token's.
            top_k: number of likeliest tokens to sample from; 0 for all.
            repetition_penalty: penalty on tokens of the last few, as in mlx-lm.
            stop: strings that end the text.
            routing: experts per token, or once for the prompt and then fused into the base.
            expert: one expert for everything: a skill's name, an expert's number, or "base".
            seed: seed of the sampling; None leaves MLX's global state.
            raw: continue the text as it is, in whatever form the skills were learned.
            system: system message; the prompt is then asked as a chat.

        Raises UserError for a prompt that is too long and for an unknown expert.
        """
        session = self._session(
            max_tokens, temperature=temperature, top_p=top_p, min_p=min_p, top_k=top_k, repetition_penalty=repetition_penalty,
            stop=stop, routing=routing, expert=expert, seed=seed, raw=raw, system=system,
        )  # fmt: skip
        ids = session.tokens(prompt)
        yield from session.answer(prompt, ids, session.prompt_gates(ids))

    def _session(
        self,
        max_tokens: int,
        *,
        stop: tuple[str, ...] = (),
        routing: Literal["token", "prompt"] = "token",
        expert: str | None = None,
        seed: int | None = None,
        raw: bool = False,
        system: str | None = None,
        **sampling: Any,
    ) -> Session:
        """Return a session with the options of `stream`; `sampling` are fields of `Sampling`."""
        if seed is not None:
            mx.random.seed(seed)
        settings = GenerationSettings(max_tokens, routing, expert, Sampling(**sampling), stop, raw, system)
        return Session(self._opened, settings)

    @overload
    def generate(self, prompt: str, max_tokens: int = 256, **options: Any) -> Generated: ...

    @overload
    def generate(
        self, prompt: list[str] | tuple[str, ...], max_tokens: int = 256, **options: Any
    ) -> list[Generated]: ...

    def generate(
        self, prompt: str | list[str] | tuple[str, ...], max_tokens: int = 256, **options: Any
    ) -> Generated | list[Generated]:
        """Return a complete continuation; of a list of prompts one for each, generated at once, which is faster.

        The options are those of `stream`. With temperature 0 a prompt has the same continuation alone and in a list.
        """
        names = formats.expert_names(self._opened.pool)
        if not isinstance(prompt, str):
            session = self._session(max_tokens, **options)
            return [
                Generated(text, count_experts(names, expert_ids), summary)
                for text, expert_ids, summary in session.answer_all(prompt)
            ]
        text, expert_ids, summary = "", [], None
        for piece in self.stream(prompt, max_tokens, **options):
            if isinstance(piece, GenerationSummary):
                summary = piece
                continue
            text += piece.text
            expert_ids += [] if piece.expert_id is None else [piece.expert_id]
        assert summary is not None
        return Generated(text, count_experts(names, expert_ids), summary)

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

    def add_skill(
        self, source: str, name: str, *, quiet: bool = False, callbacks: Sequence[Callback] = (), **options: Any
    ) -> Run:
        """Train the run on one more skill and return the run with it.

        The folder keeps the earlier state in checkpoints/before-NAME.

        Args:
            source: packaged/NAME, a file, a pattern of files, a folder, or a hub data set.
            name: name of the skill.
            quiet: print only warnings and errors.
            callbacks: called as the skill is learned.
            options: fields of `Source`, such as preset or rank.

        Raises UserError for a wrong option or source, and for a run that has not finished; Failure as `learn` does.
        """
        try:
            skill = Source(name=name, source=source, **options)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
        return _train(lambda: run_folder.extend_run(self.folder, skill), quiet, callbacks)

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
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Train a new run in runs_folder/name.

    Args:
        config: a YAML file, the name of a shipped config, or a Config, which needs `name`.
        name: name of the run folder; None for the config's name.
        runs_folder: parent folder of the run folder.
        quiet: print only warnings and errors.
        options: overrides of the file's options, such as {"training.epochs": 5}; not for a Config.
        callbacks: called as the run goes on.

    Raises UserError for a mistake in any of them, and for a folder that exists; Failure if the run cannot go on, such as on
    a full disk or an exception of a callback: it can be resumed.
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
    return _train(lambda: run_folder.start_run(config, folder), quiet, callbacks)


def _train(start: Callable[[], Training], quiet: bool, callbacks: Sequence[Callback]) -> Run:
    checked = Callbacks(callbacks)
    with console.output_mode("quiet" if quiet else "text"):
        run = start()
        run.callbacks = checked
        loop.learn_stream(run)
    return load(run.folder)
