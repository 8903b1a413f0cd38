"""Train a projection head for skill embeddings, and say what it is worth.

    python tools/benchmarks/train_projection.py --holdout sql stripe --out head.safetensors
    python tools/benchmarks/train_projection.py api=mine/api api=mine/more_api notes.jsonl mine/scripts --out head.safetensors
    python -m dylora_mlx.train --growth.projection head.safetensors

A source is a .jsonl file, a folder, packaged/NAME or a hub data set, with a name for its skill before it if that is not
the source's own; sources of one name are one skill. Without sources the packaged skills are taken. At least three skills
must be left to train on; twenty serve better. The head moves all cosines: choose growth.threshold between the two means
printed, or let growth.false_alarm calibrate it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import numpy as np

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.config import Config, GrowthConfig, Source
from dylora_mlx.data import skills, stream
from dylora_mlx.errors import UserError
from dylora_mlx.growth.novelty import projection
from dylora_mlx.growth.novelty.embedding import DocumentMeans, EmbeddingSpace
from dylora_mlx.growth.novelty.projection import ProjectionHead
from dylora_mlx.model.base.load import Base, load_base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.system.files import check_output_file
from dylora_mlx.training.skill.base_pass import base_states, load_reference_statistics

PACKAGED = [f"packaged/{name}" for name in ("flask", "python", "requests", "sql", "stripe")]
DEFAULT = [*PACKAGED, "requests=packaged/requests_more"]
FEWEST = 32
"""Documents of a skill, at least."""
BATCHES = (4, 16)
"""Documents in the batches that are compared."""
TESTED, ROUNDS = 0.25, 50
"""Share of a trained skill's documents that only the report sees, and draws of batches behind a figure."""


class Separation(NamedTuple):
    """auc: chance that two batches of one skill are closer than two of different skills; the mean cosines of both kinds."""

    auc: float
    same: float
    different: float


def sources(named: list[str], limit: int) -> dict[str, list[Source]]:
    """Sources by the name of their skill, from SOURCE or NAME=SOURCE."""
    found: dict[str, list[Source]] = {}
    for text in named:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = Path(text).stem, text
        try:
            found.setdefault(name, []).append(Source(name=name, source=path, limit=limit))
        except ValueError as error:
            raise UserError(f"{text}: {error}; write NAME=SOURCE") from error
    return found


def document_means(base: Base, model: RoutedDecoder, found: list[Source], config: Config) -> np.ndarray:
    """Mean final-norm states float32 [n, D] of the training documents of a skill's sources.

    Raises UserError for a source that cannot be read, fewer than FEWEST documents, or states that are not finite.
    """
    parts = []
    for source in found:
        train = stream.prepare_skill(source, config.data, base.tokenizer, config.seed).train
        means = DocumentMeans(np.arange(train.num_documents), base.args.hidden_size)
        for states in base_states(model, train.segments, config.data.max_seq_length, config.training.batch_size):
            at = 0
            for piece in (train.segments[i] for row in states.batch.rows for i in row):
                means.add(piece.document, states.final[at : at + piece.positions])
                at += piece.positions
        parts.append(means.means().astype(np.float32))
    joined = np.concatenate(parts)
    if len(joined) < FEWEST:
        raise UserError(f"skill '{found[0].name}': {len(joined)} documents, at least {FEWEST} are needed")
    if not np.isfinite(joined).all():
        raise UserError(f"skill '{found[0].name}': the base's states are not finite; use --dtype float32")
    return joined


def separation(
    space: EmbeddingSpace, tested: list[np.ndarray], others: list[np.ndarray], batch: int, seed: int
) -> Separation:
    """How well batches of the tested skills, document means [n, D], find their own kind among these and the others.

    Batches hold `batch` documents, or half a skill's where there are fewer.
    """
    rng, same, different = np.random.default_rng(seed), [], []
    for _ in range(ROUNDS):
        pairs = []
        for means in (*tested, *others):
            size = min(batch, len(means) // 2)
            order = rng.permutation(len(means))
            pairs.append([means[order[:size]].mean(0), means[order[size : 2 * size]].mean(0)])
        first, second = space(np.array(pairs)).swapaxes(0, 1)
        cosines = first[: len(tested)] @ second.T
        own = np.eye(*cosines.shape, dtype=bool)
        same.append(cosines[own])
        different.append(cosines[~own])
    alike, unlike = np.concatenate(same), np.sort(np.concatenate(different))
    below = np.searchsorted(unlike, alike, "left") + np.searchsorted(unlike, alike, "right")
    return Separation(float(below.mean() / 2 / len(unlike)), float(alike.mean()), float(unlike.mean()))


def report(
    title: str, spaces: Mapping[str, EmbeddingSpace], tested: list[np.ndarray], others: list[np.ndarray], seed: int
) -> None:
    """Print the separation in each space."""
    print(f"\n{title}")
    for batch in BATCHES:
        for name, space in spaces.items():
            auc, same, different = separation(space, tested, others, batch, seed)
            print(
                f"  batches of {batch:2d}, {name}  AUC {auc:.4f}  mean cosine {same:+.3f} same, {different:+.3f} different"
            )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python tools/benchmarks/train_projection.py", __doc__)
    parser.add_argument(
        "sources", nargs="*", metavar="SOURCE", help="NAME=SOURCE or SOURCE (default: the packaged skills)"
    )
    parser.add_argument("--holdout", nargs="+", default=[], metavar="NAME", help="skills that only the report sees")
    parser.add_argument("--out", type=Path, help="file to write; without it the head is only measured")
    parser.add_argument("--base", default="embedded", help="embedded, a folder, or a hub id")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="type of its weights")
    parser.add_argument(
        "--whitening", type=float, default=GrowthConfig().whitening, help="as growth.whitening of later runs"
    )
    parser.add_argument("--limit", type=int, default=256, help="documents of each source, at most")
    parser.add_argument("--hidden", type=int, default=projection.DEFAULT.hidden, help="width of the head")
    parser.add_argument("--steps", type=int, default=projection.DEFAULT.steps, help="steps of training, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the splits, the batches and the initial weights")
    options = parser.parse_args(argv)
    for name, least in (("limit", FEWEST), ("hidden", 1), ("steps", 1), ("seed", 0), ("whitening", 0)):
        if not getattr(options, name) >= least:
            parser.error(f"--{name}: {getattr(options, name)} is not at least {least}")
    for name, most in (("hidden", 2**16), ("seed", 2**31 - 1), ("whitening", 1e6)):
        if not getattr(options, name) <= most:
            parser.error(f"--{name}: {getattr(options, name)} is beyond {most:g}")
    if options.out:
        check_output_file(options.out, make_parents=True)
    return options


class Parts(NamedTuple):
    """Document means [n, D]: of each skill trained on, those to train on and those to test; of each skill held out."""

    taught: list[np.ndarray]
    tested: list[np.ndarray]
    new: list[np.ndarray]


def divide(means: Mapping[str, np.ndarray], holdout: list[str], seed: int) -> Parts:
    """Divide skills, and the documents of those that are not held out, at random."""
    rng, parts = np.random.default_rng(seed), Parts([], [], [])
    for name, found in means.items():
        if name in holdout:
            parts.new.append(found)
        else:
            test, taught = np.split(found[rng.permutation(len(found))], [round(TESTED * len(found))])
            parts.tested.append(test)
            parts.taught.append(taught)
    return parts


def command(argv: list[str]) -> int:
    options = parse(argv)
    named = sources(options.sources or DEFAULT, options.limit)
    if unknown := [name for name in options.holdout if name not in named]:
        raise UserError(f"--holdout {unknown[0]}: no such skill; there are {', '.join(named)}")
    for source in (source for found in named.values() for source in found):
        skills.locate_source(source)
    if len(named.keys() - set(options.holdout)) < 3:
        raise UserError("at least three skills must be left to train on; name more sources, or hold out fewer")
    base = load_base(options.base, options.dtype)
    config = Config(skills=[next(iter(named.values()))[0]], growth=GrowthConfig(base_skill=None), seed=options.seed)
    model = RoutedDecoder(base, config.model.projections, "final")
    reference = load_reference_statistics(base, model, config)
    means = {name: document_means(base, model, found, config) for name, found in named.items()}
    print("documents:", ", ".join(f"{name} {len(found)}" for name, found in means.items()))
    parts, started = divide(means, options.holdout, options.seed), time.perf_counter()
    settings = projection.DEFAULT._replace(hidden=options.hidden, steps=options.steps, seed=options.seed)
    head = projection.train_head(parts.taught, reference, options.whitening, settings)
    print(f"trained on {len(parts.taught)} skills in {time.perf_counter() - started:.1f} s")
    plain = EmbeddingSpace(reference, options.whitening)
    spaces = {"without": plain, "with   ": EmbeddingSpace(reference, options.whitening, head)}
    report("skills trained on, other documents of theirs:", spaces, parts.tested, [], options.seed)
    if parts.new:
        report(
            "skills held out, among each other and against the above:", spaces, parts.new, parts.tested, options.seed
        )
    else:
        print("\nno skill was held out (--holdout): nothing is known of what the head does to new skills")
    if options.out:
        write(head, options.out, base, options.whitening)
    return 0


def write(head: ProjectionHead, path: Path, base: Base, whitening: float) -> None:
    try:
        head.save(path, base.fingerprint, whitening)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be written ({error})") from error
    print(f"\nthe head is in {path}; use it with --growth.projection {path} --growth.whitening {whitening}")


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
