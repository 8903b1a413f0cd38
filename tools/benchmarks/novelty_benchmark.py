"""Benchmark the detection of new skills, known skills and files that mix two, on many streams of labelled documents.

    python tools/benchmarks/novelty_benchmark.py                              40 streams, half of them held out
    python tools/benchmarks/novelty_benchmark.py --streams 100 --seed 1       other streams
    python tools/benchmarks/novelty_benchmark.py --sources data/ more.jsonl   more labels: each file or folder in a folder is one
    python tools/benchmarks/novelty_benchmark.py --json found.json            also write every decision

Labels are the packaged skills and text found on this machine: Python packages, C, C++, manuals. They are divided in
two: settings were chosen on the development streams, and the held-out streams have other labels. The first run computes
the document means (minutes) and caches them in ~/.cache/dylora_mlx/novelty.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from novelty import judging, labels, lessons, policies, report, streams
from novelty.judging import Judged, Player
from novelty.means import Bank, Encoder
from novelty.probing import Lab
from novelty.streams import Half, Stream
from rich.console import Console
from rich.progress import track

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.config import GrowthConfig
from dylora_mlx.errors import Failure
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace

console = Console()


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python tools/benchmarks/novelty_benchmark.py", __doc__)
    parser.add_argument(
        "--streams",
        type=int,
        default=40,
        help="number of streams: half with development labels, half with held-out ones",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the division of labels and of the streams")
    parser.add_argument(
        "--probe", choices=["none", "held-out", "both"], default="held-out",
        help="streams on which the probe and the bandit take part; they train experts, which takes most of the time",
    )  # fmt: skip
    parser.add_argument(
        "--lessons",
        type=int,
        default=2,
        help="number of development streams that the bandit learns from; 0 leaves the bandit out",
    )
    parser.add_argument("--base", default="embedded", help="embedded, or a folder with a Gemma 3 text model")
    parser.add_argument(
        "--sources",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="more labels: .jsonl files and folders; a folder of these adds one label for each",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements to this file")
    parser.add_argument(
        "--bandit", type=int, default=4, help="streams per half that the bandit decides on; it measures every arrival"
    )
    options = parser.parse_args(argv)
    if options.streams < 2:
        parser.error("--streams must be at least 2")
    for name in ("seed", "lessons", "bandit"):
        if getattr(options, name) < 0:
            parser.error(f"--{name} must not be negative")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: {options.json.parent} is no folder")
    if options.lessons and not options.bandit:
        parser.error("--bandit must be at least 1, or --lessons 0")
    return options


def play(half: Half, count: int, seed: int, player: Player, bandit: int = 0) -> list[Judged]:
    """Judge all arrivals of a half's streams. The bandit takes part in the first `bandit` streams only."""
    judged: list[Judged] = []
    for number, stream in enumerate(tracked(half, streams.make(half, count, seed), "judged")):
        judged += player.play(number, stream)
        if number + 1 == bandit:
            player.policies = {name: policy for name, policy in player.policies.items() if name != "bandit"}
    return judged


def tracked(half: Half, streams: list[Stream], verb: str) -> Iterable[Stream]:
    """Iterate over streams, with a progress bar on stderr."""
    title = f"{half.name} streams {verb}"
    return track(streams, title, console=Console(stderr=True), transient=True)


def show(half: Half, judged: list[Judged], bank: Bank, space: EmbeddingSpace) -> None:
    """Print the tables of one half, its commonest mistakes and its most similar labels."""
    count = len({case.stream for case in judged})
    console.print(f"\n[bold]{half.name}[/]: {count} streams, {len(judged)} arrivals of {len(half.labels)} labels: "
                  f"{', '.join(label.name for label in half.labels)}")  # fmt: skip
    console.print(report.decisions("decisions on files of one skill, with 95% intervals", judged))
    console.print(report.kinds("right decisions by kind of arrival", judged))
    console.print(report.mixtures("files that mix two skills", judged))
    policy = judging.names(judged)[0]
    probed = sum(case.verdicts[policy].probed for case in judged if policy in case.verdicts)
    console.print(f"mistakes of {policy} ({probed} probed): " + ("; ".join(report.mistakes(judged, policy)) or "none"))
    pairs = (f"{a} and {b} {cosine:.2f}" for cosine, a, b in report.alike(half, bank, space))
    console.print("labels most alike: " + ", ".join(pairs))


def run(options: argparse.Namespace) -> None:
    all_labels, growth = labels.collect(options.sources), GrowthConfig()
    encoder = Encoder(options.base)
    bank, space, lab = (
        Bank(all_labels, encoder),
        EmbeddingSpace(encoder.reference, growth.whitening),
        Lab(encoder, growth),
    )
    development, held_out = streams.halves(all_labels, options.seed)
    player = partial(Player, bank, space, split=policies.splitter(growth), share=growth.moving_average)
    learned = None
    if options.probe != "none" and options.lessons:
        lesson_streams = tracked(development, streams.make(development, options.lessons, options.seed), "learned from")
        learned = lessons.learn(player({}), lesson_streams, lab, growth)
        console.print(f"the bandit, after {options.lessons} development streams: {learned[1]}")
    results = {}
    for half, count in ((development, options.streams // 2), (held_out, options.streams - options.streams // 2)):
        probed = options.probe in (half.name.replace(" ", "-"), "both")
        half_player = player(policies.policies(growth, lab if probed else None, learned))
        judged = play(half, count, options.seed, half_player, options.bandit)
        show(half, judged, bank, space)
        results[half.name] = {"labels": [label.name for label in half.labels], **report.values(judged)}
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def command(argv: list[str]) -> int:
    options = parse(argv)
    try:
        run(options)
    except (OSError, RuntimeError) as error:
        raise Failure(str(error)) from error
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
