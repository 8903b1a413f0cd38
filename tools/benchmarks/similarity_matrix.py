"""Measure how similar skills look to a base: a matrix of similarities, beside what the labels say.

    python tools/benchmarks/similarity_matrix.py --out matrix                                  packaged skills and installed software
    python tools/benchmarks/similarity_matrix.py --base model.gguf --sources tasks/ --kin mnli=cb --out matrix
    python tools/benchmarks/similarity_matrix.py --words alpaca.jsonl java 'c#' sql --out matrix

Writes matrix.json and matrix.md to --out. Document means are kept there too, so a second call, or one with more
documents, computes only what is missing. Use one folder for each base. Two measures are compared: the cosine of skill
embeddings, and the corrected cosine that a run decides by (dylora_mlx/growth/novelty/similarity.py). Each is given for
random halves of a skill, for its halves in the order of the source, and for each pair of skills.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from novelty import labels, store
from novelty.labels import Label
from novelty.means import Encoder
from novelty.store import Documents

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.config import GrowthConfig
from dylora_mlx.errors import Failure, UserError
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace
from dylora_mlx.growth.novelty.similarity import corrected_cosine, mean_state
from dylora_mlx.system.files import atomic_write

FEWEST = 20
"""Minimum number of documents of a label."""
SHOWN = 12
"""Pairs of each kind that the summary names."""


class Measure(NamedTuple):
    """A similarity of two skills: each skill's document means [n, D] are summarised once, and the summaries compared."""

    summarise: Callable[[np.ndarray], Any]
    compare: Callable[[Any, Any], float]


class Matrix(NamedTuple):
    """Similarities by one measure. Field names are keys of the JSON file."""

    pairs: list[list[float]]
    """Similarity of the first random half of a skill (row) to the second half of another (column), [N][N]."""
    halves: list[float]
    """Similarity of the halves of each skill in the order of the source, [N]."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python tools/benchmarks/similarity_matrix.py", __doc__)
    parser.add_argument("--base", default="embedded", help="embedded, a folder, a GGUF file or a hub id")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="folder for results and document means"
    )
    parser.add_argument(
        "--sources", type=Path, nargs="+", default=[], metavar="PATH",
        help="more skills: .jsonl files and folders; a folder of these adds one for each",
    )  # fmt: skip
    parser.add_argument(
        "--words", nargs="+", action="append", default=[], metavar="ITEM",
        help="a .jsonl file, then words: one skill for the records whose first line has that word",
    )  # fmt: skip
    parser.add_argument(
        "--kin", nargs="+", default=["requests=requests_more"], metavar="A=B", help="skills of one kind"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="leave out all other skills")
    parser.add_argument("--documents", type=int, default=64, help="maximum documents of a skill")
    parser.add_argument("--tokens", type=int, default=256, help="tokens that are read of a document, at most")
    options = parser.parse_args(argv)
    if options.documents < FEWEST:
        parser.error(f"--documents: {options.documents} is not at least {FEWEST}")
    if options.tokens < 8:
        parser.error(f"--tokens: {options.tokens} is not at least 8")
    if short := next((items for items in options.words if len(items) < 2), None):
        parser.error(f"--words {short[0]}: name at least one word after the file")
    if wrong := next((pair for pair in options.kin if pair.count("=") != 1), None):
        parser.error(f"--kin: {wrong} is no pair NAME=NAME")
    return options


def collect(options: argparse.Namespace) -> list[Label]:
    """Return the labels that the options ask for. Raises UserError for a missing file and for an unknown name."""
    found = labels.collect(options.sources, {})
    for file, *words in options.words:
        if not Path(file).exists():
            raise UserError(f"--words: {file}: no such file or folder")
        found += labels.by_word(Path(file), words, FEWEST)
    names = [label.name for label in found]
    if unknown := next((name for name in options.only if name not in names), None):
        raise UserError(f"--only: no skill '{unknown}'; there are {', '.join(names)}")
    chosen = [label for label in found if not options.only or label.name in options.only]
    if len(chosen) < 2:
        raise UserError("--only: name at least two skills")
    return chosen


def measures(encoder: Encoder) -> dict[str, Measure]:
    """Return the measures by name."""
    space = EmbeddingSpace(encoder.reference, GrowthConfig().whitening)
    return {
        "cosine": Measure(lambda means: space(means.mean(0)), lambda first, second: float(first @ second)),
        "corrected cosine": Measure(partial(mean_state, space=space), corrected_cosine),
    }


def compare(skills: Sequence[Documents], measure: Measure) -> Matrix:
    """Compute a matrix. The documents of a skill are in random order."""
    halves = [map(measure.summarise, np.array_split(documents.means, 2)) for documents in skills]
    firsts, seconds = zip(*halves, strict=True)
    in_order = [np.array_split(documents.means[np.argsort(documents.places)], 2) for documents in skills]
    return Matrix(
        [[measure.compare(first, second) for second in seconds] for first in firsts],
        [measure.compare(*map(measure.summarise, pair)) for pair in in_order],
    )


def relations(names: Sequence[str], kin: Sequence[str]) -> list[list[str]]:
    """Return what the labels say of each pair, [N][N]: same, kin or new."""
    pairs = [set(pair.split("=")) for pair in kin]
    return [["same" if a == b else "kin" if {a, b} in pairs else "new" for b in names] for a in names]


def summary(name: str, names: Sequence[str], matrix: Matrix, relation: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown section: the extremes of each kind of pair, and the matrix."""
    pairs = matrix.pairs
    same = sorted((pairs[i][i], label) for i, label in enumerate(names))
    halves = sorted(zip(matrix.halves, names, strict=True))
    others = [
        (max(pairs[i][j], pairs[j][i]), f"{names[i]} and {names[j]}", relation[i][j])
        for i, j in combinations(range(len(names)), 2)
    ]
    new = sorted(((value, text) for value, text, what in others if what == "new"), reverse=True)
    kin = sorted(((value, text) for value, text, what in others if what == "kin"), reverse=True)
    rows = (
        ("same skill, random halves: lowest", same),
        ("same skill, halves in order: lowest", halves),
        ("new skills: highest", new),
        ("kin: highest", kin),
    )
    lines = ["", f"## {name}", "", "| pairs | similarity |", "| --- | --- |"]
    lines += [
        f"| {title} | {', '.join(f'{text} {value:.2f}' for value, text in found[:SHOWN])} |" for title, found in rows
    ]
    lines += [
        "",
        f"| | {' | '.join(str(number) for number in range(len(names)))} |",
        "| --- |" + " ---: |" * len(names),
    ]
    for number, (label, row) in enumerate(zip(names, pairs, strict=True)):
        lines.append(f"| {number} {label} | {' | '.join(f'{value:.2f}' for value in row)} |")
    return lines


def run(options: argparse.Namespace) -> None:
    chosen = collect(options)
    options.out.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(options.base)
    skills = [
        store.documents(label, encoder, options.documents, options.tokens, options.out / "means") for label in chosen
    ]
    names = [label.name for label in chosen]
    relation = relations(names, options.kin)
    matrices = {name: compare(skills, measure) for name, measure in measures(encoder).items()}
    result = {
        "base": encoder.base.fingerprint,
        "skills": {
            name: {"documents": len(documents.means), "tokens": len(documents.ids)}
            for name, documents in zip(names, skills, strict=True)
        },
        "relations": relation,
        "measures": {name: matrix._asdict() for name, matrix in matrices.items()},
    }
    lines = [f"# Similarities of {len(names)} skills"]
    for name, matrix in matrices.items():
        lines += summary(name, names, matrix, relation)
    for file, text in (("matrix.json", json.dumps(result, indent=1)), ("matrix.md", "\n".join(lines) + "\n")):
        with atomic_write(options.out / file) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(options.out / file)


def command(argv: list[str]) -> int:
    options = parse(argv)
    try:
        run(options)
    except OSError as error:
        raise Failure(str(error)) from error
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
