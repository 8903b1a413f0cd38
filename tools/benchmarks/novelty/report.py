"""Results as tables for the terminal and as values for a JSON file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from rich.table import Table

from dylora_mlx.growth.novelty.embedding import EmbeddingSpace
from novelty import judging
from novelty.judging import Judged, Share
from novelty.means import Bank
from novelty.streams import KINDS, Arrival, Half, Part

ALIKE = 6
"""Number of label pairs, and of mistakes, to print."""


def share_text(share: Share) -> str:
    """Format a share with its interval."""
    if not share.total:
        return "-"
    return f"{share.value:.1%} [{share.low:.1%}, {share.high:.1%}]"


def decisions(title: str, judged: Sequence[Judged]) -> Table:
    """Return a table with one row per policy: right decisions on files of one skill, and the kinds of wrong ones."""
    table = Table(title=title, title_justify="left")
    for name in (
        "policy",
        "right decisions",
        "a split is wrong",
        "false creations",
        "missed creations",
        "right skill",
        "on parts of mixed files",
    ):
        table.add_column(name, justify="left" if name == "policy" else "right")
    measures = (
        judging.decisions,
        judging.unsplit_decisions,
        judging.false_creations,
        judging.missed_creations,
        judging.right_skill,
    )
    for policy in judging.names(judged):
        cells = [share_text(measure(judged, policy)) for measure in (*measures, judging.mixed_parts)]
        table.add_row(policy, *cells)
    return table


def kinds(title: str, judged: Sequence[Judged]) -> Table:
    """Return a table of right decisions by kind of arrival."""
    table = Table(title=title, title_justify="left")
    table.add_column("policy")
    plain = [kind for kind in KINDS if kind != "mixed"]
    for kind in plain:
        table.add_column(f"{kind} ({sum(j.arrival.kind == kind for j in judged)})", justify="right")
    for policy in judging.names(judged):
        cells = [judging.decisions(judged, policy, lambda j, kind=kind: j.arrival.kind == kind) for kind in plain]
        table.add_row(policy, *map(share_text, cells))
    return table


def mixtures(title: str, judged: Sequence[Judged]) -> Table:
    """Return a table of how mixed files, and files of one skill, were split."""
    table = Table(title=title, title_justify="left")
    sides = [j.right for j in judged if j.arrival.kind == "mixed" and j.parts > 1]
    cells = {
        f"split, {judging.RIGHT:.0%} of documents right": share_text(judging.split_rightly(judged)),
        f"{judging.MOSTLY:.0%} right": share_text(judging.split_rightly(judged, judging.MOSTLY)),
        "split at all": share_text(judging.split_at_all(judged)),
        "median right": f"{np.median(sides):.1%}" if sides else "-",
        "files of one skill split": share_text(judging.split_wrongly(judged)),
    }
    for name in cells:
        table.add_column(name, justify="right")
    table.add_row(*cells.values())
    return table


def mistakes(judged: Sequence[Judged], policy: str) -> list[str]:
    """Return the commonest wrong decisions of a policy, as text with counts."""
    counts = Counter()
    for j in judged:
        if j.arrival.kind == "mixed":
            continue
        part, verdict = j.arrival.parts[0], j.verdicts[policy]
        if verdict.novel and part.known:
            counts[f"{part.label} ({part.variant or 'another shard'}) called new"] += 1
        elif not verdict.novel and not part.known:
            counts[f"{part.label} taken for {judging.label_of(verdict.nearest)}"] += 1
    return [f"{text}: {count}" for text, count in counts.most_common(ALIKE)]


def alike(half: Half, bank: Bank, space: EmbeddingSpace) -> list[tuple[float, str, str]]:
    """Return the (cosine, label, label) of the labels whose first shards are most similar."""
    names = [label.name for label in half.labels]
    parts = [Part(label.name, 0, None, label.shards[0].stop, False) for label in half.labels]
    embeddings = np.stack([space(bank.means(Arrival("new", (p,)))[0].astype(np.float64).mean(0)) for p in parts])
    cosines = embeddings @ embeddings.T
    pairs = [(float(cosines[i, j]), names[i], names[j]) for i in range(len(names)) for j in range(i)]
    return sorted(pairs, reverse=True)[:ALIKE]


def values(judged: Sequence[Judged]) -> dict:
    """Return all figures of the tables, and every decision, as JSON values."""
    per_policy = {
        policy: {
            "right": judging.decisions(judged, policy)._asdict(),
            "right_and_whole": judging.unsplit_decisions(judged, policy)._asdict(),
            "probed": sum(j.verdicts[policy].probed for j in judged if policy in j.verdicts),
            "false_creations": judging.false_creations(judged, policy)._asdict(),
            "missed_creations": judging.missed_creations(judged, policy)._asdict(),
            "right_skill": judging.right_skill(judged, policy)._asdict(),
            "mixed_parts": judging.mixed_parts(judged, policy)._asdict(),
        }
        for policy in judging.names(judged)
    }
    mixed = {
        "split_rightly": judging.split_rightly(judged)._asdict(),
        "split_mostly_rightly": judging.split_rightly(judged, judging.MOSTLY)._asdict(),
        "split_at_all": judging.split_at_all(judged)._asdict(),
        "split_wrongly": judging.split_wrongly(judged)._asdict(),
    }
    return {"policies": per_policy, "mixed": mixed, "arrivals": [_arrival(j) for j in judged]}


def _arrival(judged: Judged) -> dict:
    return {
        "stream": judged.stream,
        "kind": judged.arrival.kind,
        "parts": [part._asdict() for part in judged.arrival.parts],
        "verdicts": {name: verdict._asdict() for name, verdict in judged.verdicts.items()},
        "split": judged.parts,
        "right": judged.right,
    }
