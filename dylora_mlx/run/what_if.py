"""Replay a run's decisions with other growth options, from its checkpoint alone: no model, no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dylora_mlx.config.load import load_config
from dylora_mlx.errors import UserError
from dylora_mlx.growth.decide import bandit, decision_log
from dylora_mlx.growth.decide.policy import Decision, probe_from_json
from dylora_mlx.growth.decide.resimulate import PastArrival, resimulate
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.growth.novelty import embedding
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace
from dylora_mlx.run import run_folder
from dylora_mlx.run.build import load_projection_head
from dylora_mlx.training.checkpoint import checkpoint


def resimulate_run(run: Path, decisions: list[dict[str, Any]], changes: list[str]) -> list[tuple[Decision, bool]]:
    """Decide on the run's arrivals again, in order, with changed options.

    Args:
        run: the run folder.
        decisions: the lines of its decisions.jsonl.
        changes: options as in growth.threshold=0.7.

    Returns:
        For each arrival the decision, and whether the policy would have measured losses that the run did not measure.

    Raises:
        UserError: an option does not exist, the run has no intact checkpoint, or its decision log or reference is damaged.
    """
    config = load_config(run / "config.yaml", changes)
    library = _library(run)
    entries = {entry.skill: entry for entry in library.entries}
    arrivals, unclaimed = [], dict(entries)
    for record in decisions:
        if record["action"] == "import":
            unclaimed.pop(record["skill"], None)
        if record["action"] in decision_log.NON_ARRIVAL_ACTIONS:
            continue
        entry = unclaimed.pop(record["skill"], None)
        if entry is None:
            break  # decided on, but not learned yet when the checkpoint was written
        try:
            evidence = (record.get("bandit_seed", 0), *probe_from_json(record.get("probe")), record["num_experts"])
            arrivals.append(PastArrival(record["skill"], entry.means, record["tokens"], record["step"], *evidence))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            path = run / decision_log.FILE_NAME
            raise UserError(
                f"{path}: damaged at '{record['skill']}' ({error!r:.80}); restore it from a copy"
            ) from error
    if not arrivals:
        raise UserError(f"{run}: no skill was decided on here, so there is nothing to decide again")
    path = run / run_folder.REFERENCE_FILE
    if not path.is_file():
        raise UserError(f"{path}: missing, so skills cannot be compared again")
    dims = next(iter(entries.values())).means.shape[1]
    reference = embedding.load_reference(path, dims)
    space = EmbeddingSpace(reference, config.growth.whitening, load_projection_head(config, library.base, dims))
    # The entries that no arrival claimed were there before the first one.
    initial_entries = [_as_added(entry) for entry in unclaimed.values()]
    trained_bandit = bandit.train_bandit(config.growth.bandit, config.seed)
    resimulated = resimulate(arrivals, initial_entries, space, config.growth, config.seed, trained_bandit)
    return [(record.decision, record.needs_measurement) for record in resimulated]


def _as_added(entry: LibraryEntry) -> LibraryEntry:
    """Return a copy of an entry as it was added, without the updates from later arrivals of its skill."""
    return LibraryEntry(entry.skill, entry.expert, entry.means, entry.statistics, entry.memory)


def _library(run: Path) -> Library:
    """Load the library of the final checkpoint, or of the newest intact one."""
    final = run / "checkpoints" / "final"
    files = checkpoint.read(final) if final.is_dir() else checkpoint.newest(run)[1]
    try:
        described = files["pool.json"]["library"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{run}: pool.json or the library of its checkpoint is not as a run writes it") from error
    return Library.restore(described, files)
