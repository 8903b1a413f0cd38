"""Log a run to Weights & Biases: scalars, the report's plots, and optionally the final adapters as an artifact."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dylora_mlx.config import LogConfig
from dylora_mlx.reporting import page

PLOTS = ("matrix", "decisions", "timeline", "gates")
"""Sections of the report that are logged as charts after every skill."""
HISTOGRAM, EDGES = "packed_sequence_length_histogram", "packed_sequence_length_edges"
"""Names in a record of the counts of a histogram and of its bin edges, one more."""


class WandbTracker:
    """One W&B run. The first exception of W&B is a warning and ends logging to W&B; training continues.

    Args:
        log: Log options; nothing is logged if `log.wandb` is "disabled".
        folder: The run folder; its name is the name of the W&B run.
        plain_config: The config as plain values.
        run_id: Identifier of the run folder, so that a resumed run continues the same W&B run.
        warn: Receives the message about the first exception.
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
        """Log a record of metrics.jsonl."""

        def send() -> None:
            flat = flatten_record(record)
            if HISTOGRAM in record:
                import wandb

                flat[HISTOGRAM] = wandb.Histogram(np_histogram=(record[HISTOGRAM], record[EDGES]))
            self.run.log(flat, step=step)

        if self.run is not None:
            self._guarded(send)

    def log_charts(self, step: int) -> None:
        """Log the report's charts: loss matrix, decisions, expert timeline and gates."""

        def send() -> None:
            import wandb

            charts = wandb.Html(page.run_page(self.folder, PLOTS), inject=False)
            self.run.log({"pictures": charts}, step=step)

        if self.run is not None:
            self._guarded(send)

    def finish(self, summary: dict[str, Any], matrix: Sequence[dict[str, float]], after: Sequence[str]) -> None:
        """Log the summary, the loss matrix as a table, the report and, if `log.artifact` is set, the final adapters.

        Args:
            summary: Final metrics.
            matrix: Losses by domain, one row per evaluation.
            after: Name of each row of the matrix: the skill learned before it.
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
                artifact = wandb.Artifact(_artifact_name(self.folder.name), type="model", metadata=summary)
                artifact.add_dir(str(self.folder / "checkpoints" / "final"))
                artifact.add_file(str(self.folder / "config.yaml"))
                self.run.log_artifact(artifact)
            self.run.summary.update(summary)
            self.run.finish()
            self.run = None

        if self.run is not None:
            self._guarded(send)

    def close(self, exit_code: int) -> None:
        """End the W&B run early with this exit code. Everything logged so far is kept; no effect after `finish`."""
        if self.run is not None:
            self._guarded(lambda: self.run.finish(exit_code=exit_code))
            self.run = None

    def _guarded(self, send: Callable[[], None]) -> None:
        """Call `send`; on any exception warn and stop logging to W&B."""
        try:
            send()
        except Exception as error:
            self.warn(f"W&B stopped answering, metrics.jsonl goes on: {_first_line(error)}")
            self.run = None


def flatten_record(record: dict[str, Any]) -> dict[str, Any]:
    """Flatten a record to scalars with slash-separated names, which W&B can plot.

    Example: `usage/sql/2` is the gate of expert 2 on the domain sql. The packing histogram is left out: as separate
    scalars its counts would not plot.
    """
    flat: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name}/{key}", inner)
        elif isinstance(value, list):
            if name not in (HISTOGRAM, EDGES):
                for i, inner in enumerate(value):
                    add(f"{name}/{i}", inner)
        else:
            flat[name] = value

    for name, value in record.items():
        add(name, value)
    return flat


def _artifact_name(name: str) -> str:
    """Return a valid artifact name: W&B allows letters, digits, dashes, underscores and dots."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)[:120] + "-adapters"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
