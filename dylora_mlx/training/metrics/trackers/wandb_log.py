"""Log a run to Weights & Biases: scalars, the report's plots, and optionally the final adapters as an artifact."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dylora_mlx.config import LogConfig
from dylora_mlx.reporting import page
from dylora_mlx.training.metrics.trackers.tracker import EDGES, HISTOGRAM, flatten_record

PLOTS = ("matrix", "decisions", "timeline", "gates")
"""Sections of the report that are logged as charts after every skill."""


class WandbTracker:
    """One W&B run, which a resumed run continues."""

    def __init__(self, log: LogConfig, folder: Path, plain_config: dict[str, Any], run_id: str):
        self.folder, self.upload = folder, log.artifact
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "online") if log.wandb == "disabled" else log.wandb
        self.run: Any = wandb.init(
            project=log.project_name, name=folder.name, dir=str(folder), config=plain_config, mode=mode,
            id=run_id, resume="allow", settings=wandb.Settings(init_timeout=30),
        )  # fmt: skip

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Log a record of metrics.jsonl."""
        flat = flatten_record(record)
        if HISTOGRAM in record:
            import wandb

            flat[HISTOGRAM] = wandb.Histogram(np_histogram=(record[HISTOGRAM], record[EDGES]))
        self.run.log(flat, step=step)

    def log_charts(self, step: int) -> None:
        """Log the report's charts: loss matrix, decisions, expert timeline and gates."""
        import wandb

        charts = wandb.Html(page.run_page(self.folder, PLOTS), inject=False)
        self.run.log({"pictures": charts}, step=step)

    def finish(self, summary: dict[str, Any], matrix: Sequence[dict[str, float]], after: Sequence[str]) -> None:
        """Log the summary, the loss matrix as a table, the report and, if `log.artifact` is set, the final adapters."""
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

    def close(self, exit_code: int) -> None:
        """End the W&B run early with this exit code."""
        self.run.finish(exit_code=exit_code)


def _artifact_name(name: str) -> str:
    """Return a valid artifact name: W&B allows letters, digits, dashes, underscores and dots."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)[:120] + "-adapters"
