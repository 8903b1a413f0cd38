"""Export a run for PyTorch: its experts, the whole mixture, a blend, or a full model.

    python tools/export_peft.py runs/quickstart --out peft                          a PEFT LoRA folder for each expert
    python tools/export_peft.py runs/quickstart --out mix --format runtime          the mixture, for PyTorch
    python tools/export_peft.py runs/quickstart --out mix --format xlora            the same for PEFT: see --refit-router
    python tools/export_peft.py runs/quickstart --out two --format blend --weights sql=0.7,flask=0.3
    python tools/export_peft.py runs/quickstart --out sql --format merged --expert sql
    python tools/export_peft.py runs/quickstart --out mix --format runtime --push me/mix --dry-run

With --verify (needs torch, transformers and peft: pip install 'dylora-mlx[export]') float32 logits on real text are
compared with MLX's; a difference above 1e-3 fails. Folders of a mixture hold dylora_torch.py, which runs it with torch,
transformers and safetensors alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import mlx.core as mx

from dylora_mlx.cli import parser as commands
from dylora_mlx.exporting import formats, full_model, hub, verify
from dylora_mlx.exporting import refit_router as refit
from dylora_mlx.exporting import write as exporting
from dylora_mlx.exporting.formats import Export, Mixing
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.run.folder import Opened


def parse(argv: list[str]) -> argparse.Namespace:
    parser = commands.Parser("python tools/export_peft.py", __doc__)
    add = parser.add_argument
    add("run", type=Path, help="a run folder")
    add("--out", type=Path, required=True, help="folder to write; must not exist")
    add("--format", default="experts", choices=["experts", "xlora", "runtime", "blend", "merged"])
    add("--expert", metavar="NAME", help="experts, merged: a skill's name or an expert's number (default: all experts)")
    add("--weights", metavar="NAME=W,...", help="blend, merged: how much of which expert")
    add("--top-k", metavar="K", help="xlora, runtime: experts per token instead of the run's, or dense")
    add(
        "--refit-router",
        action="store_true",
        help="xlora: fit the gate to single tokens' final states where it reads others",
    )
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="merged: of all weights (default: as they are stored)",
    )
    add("--unfinished", action="store_true", help="export the newest checkpoint of a run that has not finished")
    add("--verify", action="store_true", help="compare with transformers and peft afterwards")
    add("--push", metavar="USER/NAME", help="upload the folder to the hub, as a private repository")
    add("--public", action="store_true", help="make that repository public")
    add("--dry-run", action="store_true", help="only list what --push would upload")
    options = parser.parse_args(argv)
    _check(parser, options)
    return options


def _check(parser: commands.Parser, options: argparse.Namespace) -> None:
    """Options that the format has no use for are a mistake, not noise."""
    takes = {
        "expert": ("experts", "merged"),
        "weights": ("blend", "merged"),
        "top_k": ("xlora", "runtime"),
        "refit_router": ("xlora", "runtime"),
        "dtype": ("merged",),
    }
    for name, kinds in takes.items():
        if getattr(options, name) and options.format not in kinds:
            parser.error(f"--{name.replace('_', '-')} is for --format {' and '.join(kinds)}")
    if options.format == "blend" and not options.weights:
        parser.error("--format blend needs --weights such as sql=0.7,flask=0.3")
    if options.format == "merged" and bool(options.weights) == bool(options.expert):
        parser.error("--format merged needs either --expert or --weights")
    if (options.public or options.dry_run) and not options.push:
        parser.error("--public and --dry-run are for --push")
    if options.top_k and options.top_k != "dense" and not (options.top_k.isdecimal() and int(options.top_k)):
        parser.error(f"--top-k {options.top_k}: a number of experts, or dense")


class Plan:
    """What is exported, and how it is verified."""

    def __init__(self, run: Opened, options: argparse.Namespace):
        self.run, self.out, self.kind = run, options.out, options.format
        self.how: Mixing | None = None
        self.expert: Expert | None = None
        self.columns: list[int] = []
        self.weights: dict[str, float] = {}
        self.made: Export = getattr(self, f"_{self.kind}")(options)

    def _experts(self, options: argparse.Namespace) -> Export:
        wanted = "all" if options.expert is None else options.expert
        everything = list(range(1, len(self.run.pool) + 1))
        self.columns = everything if wanted == "all" else [formats.column_of(self.run, wanted)]
        return formats.experts(self.run, self.columns)

    def _xlora(self, options: argparse.Namespace) -> Export:
        top_k = "run" if options.top_k is None else None if options.top_k == "dense" else int(options.top_k)
        gate = None
        if options.refit_router and (self.run.model.tap != "final" or self.run.model.context):
            found = refit.refit(self.run)
            print(
                f"router fitted to final states: on held-out text {found.same:.1%} of tokens have the same first expert as with "
                f"the run's own, mean divergence {found.divergence:.4f} nats"
            )
            gate = found.gate
        self.how = formats.mixing(self.run, top_k, gate)
        return formats.mixture(self.run, self.how, self.kind)

    _runtime = _xlora

    def _blend(self, options: argparse.Namespace) -> Export:
        self.weights = exporting.parse_weights(options.weights)
        return formats.blend(self.run, self.weights)

    def _merged(self, options: argparse.Namespace) -> Export:
        self.expert, said = exporting.folded(self.run, options.expert, options.weights)
        return full_model.export(self.run, self.expert, said, getattr(mx, options.dtype) if options.dtype else None)

    def checks(self) -> Any:
        if self.kind == "experts":
            return verify.experts(self.run, self.out, self.columns)
        if self.kind == "blend":
            columns = {formats.column_of(self.run, name): weight for name, weight in self.weights.items()}
            return verify.blend(self.run, self.out, columns)
        if self.kind == "merged":
            assert self.expert is not None
            return verify.merged(self.run, self.out, self.expert)
        assert self.how is not None
        return verify.mixture(self.run, self.out, self.how, self.kind)


def command(argv: list[str]) -> int:
    options = parse(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    run = exporting.opened(options.run, "float32" if options.verify else "auto", options.unfinished)
    plan = Plan(run, options)
    exporting.write(options.run, plan.made, options.out)
    print(f"{options.format} in {options.out}: {len(plan.made.content)} files, see {options.out / 'README.md'}")
    if options.verify:
        failed = False
        for check in plan.checks():
            print(check)
            failed |= not check.passed
        if failed:
            print(f"error: {options.out} does not reproduce the run within {verify.TOLERANCE}", file=sys.stderr)
            return 1
    if options.push:
        return push(options)
    return 0


def push(options: argparse.Namespace) -> int:
    found = hub.files(options.out)
    if options.dry_run:
        kind = "public" if options.public else "private"
        print(f"would upload {sum(size for _, size in found)} bytes to {options.push} ({kind}):")
        for name, size in found:
            print(f"  {name}  {size}")
        return 0
    print(f"uploaded to {hub.push(options.out, options.push, options.public)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return commands.guarded(command, argv)


if __name__ == "__main__":
    sys.exit(main())
