"""What a run remembers of its skills, enough to decide on them again without the model."""

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
    """The run's arrivals decided on again, in order, with options changed as in growth.threshold=0.7.

    The second value says that the policy would have measured something that the run did not. Raises UserError for an
    option that does not exist and for a run without a checkpoint.
    """
    config = load_config(run / "config.yaml", changes)
    library = _library(run)
    entries = {entry.skill: entry for entry in library.entries}
    arrivals, known = [], dict(entries)
    for found in decisions:
        if found["action"] == "import":
            known.pop(found["skill"], None)
        if found["action"] in decision_log.NON_ARRIVAL_ACTIONS:
            continue
        entry = known.pop(found["skill"], None)
        if entry is None:
            break  # decided, but not learned when the checkpoint was written
        try:
            measured = (found.get("bandit_seed", 0), *probe_from_json(found.get("probe")), found["num_experts"])
            arrivals.append(PastArrival(found["skill"], entry.means, found["tokens"], found["step"], *measured))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            path = run / decision_log.FILE_NAME
            raise UserError(f"{path}: damaged at '{found['skill']}' ({error!r:.80}); restore it from a copy") from error
    if not arrivals:
        raise UserError(f"{run}: no skill was decided on here, so there is nothing to decide again")
    path = run / run_folder.REFERENCE_FILE
    if not path.is_file():
        raise UserError(f"{path}: missing, so skills cannot be compared again")
    dims = next(iter(entries.values())).means.shape[1]
    reference = embedding.load_reference(path, dims)
    space = EmbeddingSpace(reference, config.growth.whitening, load_projection_head(config, library.base, dims))
    first = [_as_it_came(entry) for entry in known.values()]
    learned = bandit.train_bandit(config.growth.bandit, config.seed)
    played = resimulate(arrivals, first, space, config.growth, config.seed, learned)
    return [(found.decision, found.needs_measurement) for found in played]


def _as_it_came(entry: LibraryEntry) -> LibraryEntry:
    """An entry before anything else was seen of its skill."""
    return LibraryEntry(entry.skill, entry.expert, entry.means, entry.statistics, entry.memory)


def _library(run: Path) -> Library:
    final = run / "checkpoints" / "final"
    files = checkpoint.read(final) if final.is_dir() else checkpoint.newest(run)[1]
    try:
        described, arrays = files["pool.json"]["library"], checkpoint.numpy_arrays(files["library.safetensors"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{run}: pool.json or the library of its checkpoint is not as a run writes it") from error
    return Library.restore(described, arrays)
