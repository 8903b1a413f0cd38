"""Train a projection head for skill embeddings, and report how well it separates skills.

    python tools/benchmarks/train_projection.py --holdout sql stripe --out head.safetensors
    python tools/benchmarks/train_projection.py api=mine/api api=mine/more_api notes.jsonl mine/scripts --out head.safetensors
    python -m dylora_mlx.train --growth.projection head.safetensors

A source is a .jsonl file, a folder, packaged/NAME or a hub data set. NAME= before it names its skill; the default is
the source's own name. Sources of the same name form one skill. Without sources, the packaged skills are used. At least
three skills must remain for training; twenty are better. The head changes all cosines: choose growth.threshold between
the two printed means.
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
"""Minimum number of documents per skill."""
BATCHES = (4, 16)
"""Numbers of documents in the batches that the report compares."""
TESTED, ROUNDS = 0.25, 50
"""Share of a training skill's documents that are reserved for the report, and number of random draws per figure."""


class Separation(NamedTuple):
    """Separation of skills in an embedding space."""

    auc: float
    """Probability that two batches of one skill are closer than two batches of different skills."""
    same: float
    """Mean cosine of batches of one skill."""
    different: float
    """Mean cosine of batches of different skills."""


def sources(named: list[str], limit: int) -> dict[str, list[Source]]:
    """Parse SOURCE and NAME=SOURCE arguments into sources by skill name. Raises UserError for an invalid one."""
    by_skill: dict[str, list[Source]] = {}
    for argument in named:
        name, equals, path = argument.partition("=")
        if not equals:
            name, path = Path(argument).stem, argument
        try:
            by_skill.setdefault(name, []).append(Source(name=name, source=path, limit=limit))
        except ValueError as error:
            raise UserError(f"{argument}: {error}; write NAME=SOURCE") from error
    return by_skill


def document_means(base: Base, model: RoutedDecoder, sources: list[Source], config: Config) -> np.ndarray:
    """Return the mean final-norm states float32 [n, D] of the training documents in a skill's sources.

    Raises UserError for an unreadable source, fewer than FEWEST documents, or non-finite states.
    """
    parts = []
    for source in sources:
        train = stream.prepare_skill(source, config.data, base.tokenizer, config.seed).train
        means = DocumentMeans(np.arange(train.num_documents), base.args.hidden_size)
        for states in base_states(model, train.segments, config.data.max_seq_length, config.training.batch_size):
            offset = 0
            for segment in (train.segments[i] for row in states.batch.rows for i in row):
                means.add(segment.document, states.final[offset : offset + segment.positions])
                offset += segment.positions
        parts.append(means.means().astype(np.float32))
    joined = np.concatenate(parts)
    if len(joined) < FEWEST:
        raise UserError(f"skill '{sources[0].name}': {len(joined)} documents, at least {FEWEST} are needed")
    if not np.isfinite(joined).all():
        raise UserError(f"skill '{sources[0].name}': the base's states are not finite; use --dtype float32")
    return joined


def separation(
    space: EmbeddingSpace, tested: list[np.ndarray], others: list[np.ndarray], batch: int, seed: int
) -> Separation:
    """Measure how well the tested skills are separated from each other and from the others.

    Args:
        space: The embedding space.
        tested: Document means [n, D] of each tested skill.
        others: Document means [n, D] of further skills, which are only compared against.
        batch: Documents per batch, but at most half of those of a skill.
        seed: Seed of the random batches.
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
        same_skill = np.eye(*cosines.shape, dtype=bool)
        same.append(cosines[same_skill])
        different.append(cosines[~same_skill])
    alike, unlike = np.concatenate(same), np.sort(np.concatenate(different))
    below = np.searchsorted(unlike, alike, "left") + np.searchsorted(unlike, alike, "right")
    return Separation(float(below.mean() / 2 / len(unlike)), float(alike.mean()), float(unlike.mean()))


def report(
    title: str, spaces: Mapping[str, EmbeddingSpace], tested: list[np.ndarray], others: list[np.ndarray], seed: int
) -> None:
    """Print the separation in each space, for each batch size."""
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
    parser.add_argument("--holdout", nargs="+", default=[], metavar="NAME", help="skills reserved for the report")
    parser.add_argument("--out", type=Path, help="file to write; without it the head is only measured")
    parser.add_argument("--base", default="embedded", help="embedded, a folder, or a hub id")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="dtype of the base's weights"
    )
    parser.add_argument(
        "--whitening",
        type=float,
        default=GrowthConfig().whitening,
        help="growth.whitening of the runs that will use the head",
    )
    parser.add_argument("--limit", type=int, default=256, help="maximum documents per source")
    parser.add_argument("--hidden", type=int, default=projection.DEFAULT.hidden, help="width of the head")
    parser.add_argument("--steps", type=int, default=projection.DEFAULT.steps, help="maximum training steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the splits, the batches and the initial weights")
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
    """Document means [n, D] of each skill, divided for training and for the report."""

    trained: list[np.ndarray]
    """Training documents of the skills that are not held out."""
    tested: list[np.ndarray]
    """Reserved documents of the same skills."""
    new: list[np.ndarray]
    """All documents of the held-out skills."""


def divide(means: Mapping[str, np.ndarray], holdout: list[str], seed: int) -> Parts:
    """Separate the held-out skills, and divide the documents of the others at random."""
    rng, parts = np.random.default_rng(seed), Parts([], [], [])
    for name, skill_means in means.items():
        if name in holdout:
            parts.new.append(skill_means)
        else:
            test, train = np.split(skill_means[rng.permutation(len(skill_means))], [round(TESTED * len(skill_means))])
            parts.tested.append(test)
            parts.trained.append(train)
    return parts


def command(argv: list[str]) -> int:
    options = parse(argv)
    by_skill = sources(options.sources or DEFAULT, options.limit)
    if unknown := [name for name in options.holdout if name not in by_skill]:
        raise UserError(f"--holdout {unknown[0]}: no such skill; there are {', '.join(by_skill)}")
    for source in (source for items in by_skill.values() for source in items):
        skills.locate_source(source)
    if len(by_skill.keys() - set(options.holdout)) < 3:
        raise UserError("at least three skills must be left to train on; name more sources, or hold out fewer")
    base = load_base(options.base, options.dtype)
    config = Config(skills=[next(iter(by_skill.values()))[0]], growth=GrowthConfig(base_skill=None), seed=options.seed)
    model = RoutedDecoder(base, config.model.projection_names, "final")
    reference = load_reference_statistics(base, model)
    means = {name: document_means(base, model, items, config) for name, items in by_skill.items()}
    print("documents:", ", ".join(f"{name} {len(items)}" for name, items in means.items()))
    parts, started = divide(means, options.holdout, options.seed), time.perf_counter()
    settings = projection.DEFAULT._replace(hidden=options.hidden, steps=options.steps, seed=options.seed)
    head = projection.train_head(parts.trained, reference, options.whitening, settings)
    print(f"trained on {len(parts.trained)} skills in {time.perf_counter() - started:.1f} s")
    plain = EmbeddingSpace(reference, options.whitening)
    spaces = {"without": plain, "with   ": EmbeddingSpace(reference, options.whitening, head)}
    report("skills trained on, reserved documents:", spaces, parts.tested, [], options.seed)
    if parts.new:
        report(
            "skills held out, compared with each other and with the above:",
            spaces,
            parts.new,
            parts.tested,
            options.seed,
        )
    else:
        print("\nno skill was held out (--holdout), so the effect of the head on new skills is unknown")
    if options.out:
        write(head, options.out, base, options.whitening)
    return 0


def write(head: ProjectionHead, path: Path, base: Base, whitening: float) -> None:
    """Save the head. Raises UserError if the file cannot be written."""
    try:
        head.save(path, base.fingerprint, whitening)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be written ({error})") from error
    print(f"\nthe head is in {path}; use it with --growth.projection {path} --growth.whitening {whitening}")


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
