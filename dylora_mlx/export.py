"""Export a run for PyTorch and llama.cpp: its experts, the whole mixture, a blend of experts, or a full model."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dylora_mlx.cli.parser import Parser, run_command

EXAMPLES = """\
  dylora export runs/quickstart --out peft                          a PEFT LoRA folder for each expert
  dylora export runs/quickstart --out gguf --format gguf-lora       the same as GGUF files, for llama.cpp
  dylora export runs/quickstart --out mix --format runtime          the mixture, for PyTorch
  dylora export runs/quickstart --out mix --format xlora            the same for PEFT: see --refit-router
  dylora export runs/quickstart --out two --format blend --weights sql=0.7,flask=0.3
  dylora export runs/quickstart --out sql --format merged --expert sql
  dylora export runs/quickstart --out mix --format runtime --push me/mix --dry-run
"""
NOTES = """
With --verify (needs torch, transformers and peft: pip install 'dylora-mlx[export]') float32 logits on real text are
compared with MLX's; a difference above 1e-3 fails. Folders of a mixture hold dylora_torch.py, which runs it with torch,
transformers and safetensors alone.
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("dylora export", f"{__doc__}{NOTES}", EXAMPLES)
    add = parser.add_argument
    add("run", type=Path, help="run folder")
    add("--out", type=Path, required=True, help="folder to write; must not exist")
    add("--format", default="experts", choices=["experts", "gguf-lora", "xlora", "runtime", "blend", "merged"])
    add(
        "--expert",
        metavar="NAME",
        help="experts, gguf-lora, merged: the expert to export, by a skill's name or its number (default: all experts)",
    )
    add("--weights", metavar="NAME=W,...", help="blend, merged: experts and their weights in the blend")
    add(
        "--top-k",
        metavar="K",
        help="xlora, runtime: experts per token, or dense for all (default: the run's growth.top_k)",
    )
    add(
        "--refit-router",
        action="store_true",
        help="xlora, runtime: fit the gate again to read single tokens' final states, if the run's router reads others",
    )
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="data type of merged's weights (default: as they are stored), or of gguf-lora's factors (default: float32)",
    )
    add("--unfinished", action="store_true", help="export the newest checkpoint of a run that has not finished")
    add("--verify", action="store_true", help="compare the export with MLX afterwards, using transformers and peft")
    add("--push", metavar="USER/NAME", help="upload the folder to the hub as a private repository")
    add("--public", action="store_true", help="make that repository public")
    add("--dry-run", action="store_true", help="only list what --push would upload")
    options = parser.parse_args(argv)
    _check_options(parser, options)
    return options


def _check_options(parser: Parser, options: argparse.Namespace) -> None:
    """Reject options that the chosen format does not use, and incomplete combinations."""
    formats_by_option = {
        "expert": ("experts", "gguf-lora", "merged"),
        "weights": ("blend", "merged"),
        "top_k": ("xlora", "runtime"),
        "refit_router": ("xlora", "runtime"),
        "dtype": ("gguf-lora", "merged"),
    }
    for name, formats in formats_by_option.items():
        if getattr(options, name) and options.format not in formats:
            *others, last = formats
            parser.error(f"--{name.replace('_', '-')} is for --format {', '.join(others)} and {last}")
    if options.format == "blend" and not options.weights:
        parser.error("--format blend needs --weights such as sql=0.7,flask=0.3")
    if options.format == "merged" and bool(options.weights) == bool(options.expert):
        parser.error("--format merged needs either --expert or --weights")
    if options.format == "gguf-lora" and options.verify and options.dtype not in (None, "float32"):
        parser.error(
            f"--verify compares float32 factors, and --dtype {options.dtype} rounds them: leave one of them out"
        )
    if (options.public or options.dry_run) and not options.push:
        parser.error("--public and --dry-run are for --push")
    if options.top_k and options.top_k != "dense" and not (options.top_k.isdecimal() and int(options.top_k)):
        parser.error(f"--top-k {options.top_k}: a number of experts, or dense")


def command(argv: list[str]) -> int:
    options = parse(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Imported after parsing: --help needs no MLX.
    from dylora_mlx.exporting.plan import ExportPlan
    from dylora_mlx.exporting.verify import TOLERANCE
    from dylora_mlx.exporting.write import open_for_export, write_export

    run = open_for_export(options.run, "float32" if options.verify else "auto", options.unfinished)
    plan = ExportPlan(run, options)
    write_export(options.run, plan.export, options.out)
    print(f"{options.format} in {options.out}: {len(plan.export.content)} files, see {options.out / 'README.md'}")
    if options.verify:
        results = []
        for result in plan.verify():
            print(result)
            results.append(result)
        if not all(result.passed for result in results):
            print(f"error: {options.out} does not reproduce the run within {TOLERANCE}", file=sys.stderr)
            return 1
    return _push(options) if options.push else 0


def _push(options: argparse.Namespace) -> int:
    """Upload the exported folder to the hub, or with --dry-run list its files. Returns the exit code 0."""
    from dylora_mlx.exporting import hub

    if not options.dry_run:
        print(f"uploaded to {hub.push_to_hub(options.out, options.push, options.public)}")
        return 0
    files = hub.upload_files(options.out)
    visibility = "public" if options.public else "private"
    print(f"would upload {sum(size for _, size in files)} bytes to {options.push} ({visibility}):")
    for name, size in files:
        print(f"  {name}  {size}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
