"""Compare the bounded fit of the router with the fit of all rows, in a pool of hundreds of experts.

    python tools/benchmarks/router_scale.py --sources site-packages/ --skills 256                 after 8, 64 and 256 skills
    python tools/benchmarks/router_scale.py --sources lib/ more/ --skills 64 --corrected 8 16 32    other bounds

Every folder of --sources with enough text is a skill: definitions of its Python files, or paragraphs of its .md, .rst and .txt
files. A bounded fit corrects the row of the newcomer and those nearest to it; the other rows are those of the discriminant. Fits are
evaluated on the validation and test text of every skill so far.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import numpy as np
from novelty import cutting
from rich.console import Console
from rich.table import Table
from router_calibration import Unseen, quality, unseen_features

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.config import Config, DataConfig, Source, TrainingConfig
from dylora_mlx.data.stream import Skill, prepare_skill
from dylora_mlx.errors import UserError
from dylora_mlx.growth.feature_statistics import PooledStatistics
from dylora_mlx.model.base.load import Base, load_base
from dylora_mlx.model.routing.router import GateRow, Router
from dylora_mlx.run.build import make_decoder
from dylora_mlx.training.skill import fit_router
from dylora_mlx.training.skill.base_pass import run_base_pass
from dylora_mlx.training.skill.router_tokens import SkillFeatures

SIZES = {"train": 40, "validation": 6, "test": 10}
"""Documents of each split."""
CHARACTERS = 500
"""Largest size of a document."""
CUTS = {".py": cutting.python, ".md": cutting.paragraphs, ".rst": cutting.paragraphs, ".txt": cutting.paragraphs}
"""What the documents of a file are, by its extension."""
FILES = 400
"""Largest number of files that are read of a folder."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python tools/benchmarks/router_scale.py", __doc__)
    add = parser.add_argument
    add("--sources", type=Path, nargs="+", required=True, metavar="FOLDER", help="folders that hold folders of text")
    add("--skills", type=int, default=256, help="number of skills")
    add(
        "--corrected",
        type=int,
        nargs="+",
        default=[fit_router.MAX_CORRECTED],
        help="numbers of rows that a fit may correct",
    )
    add(
        "--after",
        type=int,
        nargs="+",
        default=[8, 64, 256],
        help="numbers of skills after which the rows are evaluated",
    )
    add("--base", default="embedded", help="base model")
    add("--seed", type=int, default=0, help="seed of the choice and the order of the skills")
    add("--json", type=Path, help="write all results to this file")
    options = parser.parse_args(argv)
    if options.skills < 2 or min(options.corrected) < 3:
        parser.error("--skills must be at least 2, --corrected at least 3")
    return options


def find_skills(sources: list[Path], count: int, seed: int) -> Iterator[tuple[str, list[str]]]:
    """Yield a name and the documents of `count` folders in random order. Raises UserError if there are not as many."""
    folders = sorted({path.parent for source in sources for path in source.rglob("*") if path.suffix in CUTS})
    rng, needed, found, seen = np.random.default_rng(seed), sum(SIZES.values()), 0, set[str]()
    for number in rng.permutation(len(folders)):
        texts = [text for text in _documents(folders[number]) if text not in seen]
        if len(texts) < needed:
            continue
        chosen = [texts[i] for i in rng.permutation(len(texts))[:needed]]
        seen |= set(chosen)
        found += 1
        yield f"skill_{found}", chosen
        if found == count:
            return
    raise UserError(f"--sources: {found} folders have {needed} documents each; give more folders or fewer --skills")


def _documents(folder: Path) -> list[str]:
    texts = dict[str, None]()
    for path in sorted(path for path in folder.iterdir() if path.suffix in CUTS and path.is_file())[:FILES]:
        for text in CUTS[path.suffix](path.read_text(encoding="utf-8", errors="replace")):
            if cutting.readable(text):
                texts[text[:CHARACTERS]] = None
    return list(texts)


def prepare(name: str, texts: list[str], folder: Path, config: Config, base: Base) -> Skill:
    """Write the documents of a skill and read them as a run does."""
    target, begin = folder / f"skill_{len(list(folder.iterdir()))}", 0
    target.mkdir()
    for split, size in SIZES.items():
        lines = (json.dumps({"text": text}) + "\n" for text in texts[begin : begin + size])
        (target / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        begin += size
    return prepare_skill(Source(name=name, source=str(target)), config.data, base.tokenizer, config.seed)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Let the skills arrive, and return the results of every fit after each of `options.after`."""
    config = Config(
        skills=[Source(name="none", source="packaged/sql")], data=DataConfig(max_seq_length=256),
        training=TrainingConfig(memory_tokens=2048),
    )  # fmt: skip
    base = load_base(options.base, config.model.dtype, None)
    model, dims, training = make_decoder(config, base), base.args.hidden_size, config.training
    remembered, texts, rows = list[SkillFeatures](), list[Unseen](), list[dict[str, Any]]()
    with TemporaryDirectory() as place:
        for name, documents in find_skills(options.sources, options.skills, options.seed):
            skill, expert = prepare(name, documents, Path(place), config, base), len(remembered)
            base_pass = run_base_pass(model, skill, config)
            remembered.append(SkillFeatures(base_pass.statistics, base_pass.memory, expert))
            texts.append(Unseen(unseen_features(config, model, skill), expert))
            if not expert:
                continue
            if len(remembered) not in options.after:
                continue
            pooled, gates, seconds = PooledStatistics.of([each.statistics for each in remembered]), {}, {}
            for bound in [*options.corrected, None]:
                router = Router(dims)
                router.rows += [GateRow(dims) for _ in remembered[1:]]
                near = None
                if bound is not None and len(router.rows) > bound:
                    near = fit_router.nearest_rows(remembered, pooled, len(router.rows), bound)
                started, kind = time.perf_counter(), "all" if bound is None else str(bound)
                fit_router.fit(
                    router, remembered, training.router_fit_steps, training.memory_tokens, None, (), pooled, near
                )
                gates[kind], seconds[kind] = router.gate(), time.perf_counter() - started
            for kind, gate in gates.items():
                measured = quality(gate, texts)._asdict()
                rows.append({"skills": len(remembered), "corrected": kind, **measured, "seconds": seconds[kind]})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def command(argv: list[str]) -> int:
    options = parse(argv)
    rows = measure(options)
    table = Table("skills", "rows corrected", "cross-entropy", "right, %", "calibration error", "seconds")
    for row in rows:
        figures = (f"{row['cross_entropy']:.3f}", f"{100 * row['accuracy']:.1f}", f"{row['calibration_error']:.3f}")
        table.add_row(str(row["skills"]), str(row["corrected"]), *figures, f"{row['seconds']:.1f}")
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(json.dumps({"seed": options.seed, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
