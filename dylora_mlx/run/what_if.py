"""What a run remembers of its skills, enough to decide on them again without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dylora_mlx.cli import options as cli
from dylora_mlx.errors import UserError
from dylora_mlx.growth.decide import bandit
from dylora_mlx.growth.decide import decision_log as ledger
from dylora_mlx.growth.decide import resimulate as replay
from dylora_mlx.growth.decide.policy import Decision
from dylora_mlx.growth.decide.resimulate import Arrival
from dylora_mlx.growth.library import Entry, Library
from dylora_mlx.growth.novelty import embedding
from dylora_mlx.growth.novelty.embedding import Space
from dylora_mlx.run import build as assembly
from dylora_mlx.run import folder as runs
from dylora_mlx.training.checkpoint import checkpoint


def play_again(run: Path, decisions: list[dict[str, Any]], changes: list[str]) -> list[tuple[Decision, bool]]:
    """The run's arrivals decided on again, in order, with options changed as in growth.threshold=0.7.

    The second value says that the policy would have measured something that the run did not. Raises UserError for an
    option that does not exist and for a run without a checkpoint.
    """
    config = cli.load_config(run / "config.yaml", changes)
    library = _library(run)
    entries = {entry.skill: entry for entry in library.entries}
    arrivals, known = [], dict(entries)
    for found in decisions:
        if found["action"] == "import":
            known.pop(found["skill"], None)
        if found["action"] in ledger.NOT_ARRIVALS:
            continue
        entry = known.pop(found["skill"], None)
        if entry is None:
            break  # decided, but not learned when the checkpoint was written
        measured = (found.get("draw", 0), found.get("probe"), found["num_experts"])
        arrivals.append(Arrival(found["skill"], entry.means, found["tokens"], found["step"], *measured))
    if not arrivals:
        raise UserError(f"{run}: no skill was decided on here, so there is nothing to decide again")
    path = run / runs.REFERENCE
    if not path.is_file():
        raise UserError(f"{path}: missing, so skills cannot be compared again")
    dims = next(iter(entries.values())).means.shape[1]
    reference = embedding.load_reference(path, dims)
    space = Space(reference, config.growth.whitening, assembly.head_of(config, library.base, dims))
    first = [_as_it_came(entry) for entry in known.values()]
    learned = bandit.learn_from(config.growth.bandit, config.seed)
    played = replay.play(arrivals, first, space, config.growth, config.seed, learned)
    return [(found.decision, found.open) for found in played]


def _as_it_came(entry: Entry) -> Entry:
    """An entry before anything else was seen of its skill."""
    return Entry(entry.skill, entry.expert, entry.means, entry.statistics, entry.memory)


def _library(run: Path) -> Library:
    final = run / "checkpoints" / "final"
    files = checkpoint.read(final) if final.is_dir() else checkpoint.newest(run)[1]
    try:
        described, arrays = files["pool.json"]["library"], checkpoint.numpy_arrays(files["library.safetensors"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{run}: pool.json or the library of its checkpoint is not as a run writes it") from error
    return Library.restore(described, arrays)
