"""The run's report and the samples in it. Neither may ever stop a run."""

from __future__ import annotations

import json

from dylora_mlx.distributed import group as ranks
from dylora_mlx.reporting import page, records
from dylora_mlx.system import console
from dylora_mlx.training import samples
from dylora_mlx.training.run import Run


def write(run: Run) -> None:
    """Draw report.html anew."""
    if not ranks.leads():
        return
    try:
        page.write(run.folder)
    except Exception as error:  # whatever it is, the run goes on
        _warn(run, "the report could not be written", error)


def remember(run: Run) -> None:
    """Write samples.json: a document of every domain with the experts that serve it now."""
    if not ranks.leads():
        return
    try:
        path = run.folder / records.SAMPLES
        beside = path.with_suffix(".partial")
        beside.write_text(json.dumps(samples.take(run), ensure_ascii=False) + "\n", encoding="utf-8")
        beside.replace(path)
    except Exception as error:  # whatever it is, the run goes on
        _warn(run, "samples of the text could not be written", error)


def _warn(run: Run, what: str, error: Exception) -> None:
    if not run.warned:
        run.warned = True
        reason = (str(error).splitlines() or [""])[0][:200]
        console.warn(
            f"{what} ({type(error).__name__}: {reason}); the run goes on, dylora report {run.folder} draws it later"
        )
