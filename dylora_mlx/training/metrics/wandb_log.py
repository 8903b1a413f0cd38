"""Weights & Biases beside metrics.jsonl: scalars, the report's plots, and the final adapters when asked."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dylora_mlx.config import LogConfig
from dylora_mlx.reporting import page

PLOTS = ("matrix", "decisions", "timeline", "gates")
"""Sections of the report that are logged as pictures after every skill."""


class WandbTracker:
    """One W&B run. Whatever W&B raises is said once through `warn`; then it is left alone, and the training goes on.

    run_id: of this run folder, so that a resumed run goes on in the same W&B run.
    """

    def __init__(self, log: LogConfig, folder: Path, plain_config: dict, run_id: str, warn: Callable[[str], None]):
        self.folder, self.warn, self.upload = folder, warn, log.artifact
        self.run: Any = None
        if log.wandb == "disabled":
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb

            self.run = wandb.init(
                project=log.project_name, name=folder.name, dir=str(folder), config=plain_config, mode=log.wandb,
                id=run_id, resume="allow", settings=wandb.Settings(init_timeout=30),
            )  # fmt: skip
        except Exception as error:
            self.warn(f"W&B could not start, metrics.jsonl has everything: {_first_line(error)}")

    def log(self, step: int, record: dict[str, Any]) -> None:
        """A record of metrics.jsonl."""
        if self.run is not None:
            self._guarded(lambda: self.run.log(flatten_record(record), step=step))

    def log_charts(self, step: int) -> None:
        """The matrix, the decisions, the experts' lives and the gates, as the report draws them."""

        def send() -> None:
            import wandb

            drawn = wandb.Html(page.run_page(self.folder, PLOTS), inject=False)
            self.run.log({"pictures": drawn}, step=step)

        if self.run is not None:
            self._guarded(send)

    def finish(self, summary: dict[str, Any], matrix: Sequence[dict[str, float]], after: Sequence[str]) -> None:
        """The summary, the matrix as a table, the report, and the final adapters if they were asked for.

        after: the name of each row of the matrix.
        """

        def send() -> None:
            import wandb

            domains = list(matrix[-1]) if matrix else []
            rows: list[Any] = [
                [name, *(row.get(domain) for domain in domains)] for name, row in zip(after, matrix, strict=True)
            ]
            report = wandb.Html(page.run_page(self.folder), inject=False)
            self.run.log({"matrix": wandb.Table(columns=["after", *domains], data=rows), "report": report})
            if self.upload:
                made = wandb.Artifact(_artifact_name(self.folder.name), type="model", metadata=summary)
                made.add_dir(str(self.folder / "checkpoints" / "final"))
                made.add_file(str(self.folder / "config.yaml"))
                self.run.log_artifact(made)
            self.run.summary.update(summary)
            self.run.finish()
            self.run = None

        if self.run is not None:
            self._guarded(send)

    def close(self, exit_code: int) -> None:
        """Leave before the end: what was logged is kept, and the W&B run is marked as ended so."""
        if self.run is not None:
            self._guarded(lambda: self.run.finish(exit_code=exit_code))
            self.run = None

    def _guarded(self, send: Callable[[], None]) -> None:
        try:
            send()
        except Exception as error:
            self.warn(f"W&B stopped answering, metrics.jsonl goes on: {_first_line(error)}")
            self.run = None


def flatten_record(record: dict[str, Any]) -> dict[str, Any]:
    """A record with scalars only, as W&B plots them: usage/sql/2 for the third gate on sql's text; counts of a histogram,
    which it cannot read as such, are left to the report."""
    found: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name}/{key}", inner)
        elif isinstance(value, list):
            if name != "packed_sequence_length_histogram":
                for place, inner in enumerate(value):
                    add(f"{name}/{place}", inner)
        else:
            found[name] = value

    for name, value in record.items():
        add(name, value)
    return found


def _artifact_name(name: str) -> str:
    """W&B takes letters, digits, dashes, underscores and dots."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)[:120] + "-adapters"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
