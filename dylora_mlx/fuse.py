"""Fuse one expert or a blend into the base, as a model that mlx_lm.generate, mlx_lm.server and LM Studio load."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.errors import UserError
from dylora_mlx.system import console

if TYPE_CHECKING:
    from dylora_mlx.exporting.formats import Export
    from dylora_mlx.exporting.quantize import Quantization
    from dylora_mlx.model.experts.lora import Expert
    from dylora_mlx.run.run_folder import OpenedRun

EXAMPLES = """  dylora fuse runs/quickstart --expert sql --out sql-model
  dylora fuse runs/quickstart --blend sql=0.7,flask=0.3 --out both
  dylora fuse runs/quickstart --expert sql --out sql-8bit -q --q-bits 8
  python -m mlx_lm generate --model sql-model --prompt "SELECT"
"""
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
"""mlx-lm's recipes for mixed bits, here so that --help needs no MLX."""
DROWNED = 0.5
"""Share of the update's energy below which a warning says that rounding drowns the update."""


def command(argv: list[str]) -> int:
    parser = Parser("dylora fuse", __doc__, EXAMPLES)
    parser.add_argument("run", type=Path, help="run folder")
    experts_group = parser.add_mutually_exclusive_group(required=True)
    experts_group.add_argument("--expert", metavar="NAME", help="expert to fuse, by a skill's name or its number")
    experts_group.add_argument("--blend", metavar="NAME=W,...", help="experts to fuse and their weights")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--unfinished", action="store_true", help="use the newest checkpoint of a run that has not finished"
    )
    parser.add_argument(
        "-q", "--quantize", action="store_true", help="write a quantised model, as mlx_lm.convert -q does"
    )
    parser.add_argument("--q-bits", type=int, help="bits of a weight (default: 4)")
    parser.add_argument("--q-group-size", type=int, help="weights that share a scale (default: 64)")
    parser.add_argument(
        "--quant-predicate",
        choices=RECIPES,
        help="recipe of mlx-lm with more bits for some layers, in place of --q-bits",
    )
    options = parser.parse_args(argv)
    _check_options(options)
    # Imported after parsing: --help needs no MLX.
    from dylora_mlx.exporting import full_model
    from dylora_mlx.exporting.write import expert_to_fuse, open_for_export, write_export

    quantization = _quantization(options)
    run = open_for_export(options.run, "auto", options.unfinished)
    expert, description = expert_to_fuse(run, options.expert, options.blend, "--blend")
    if run.base.is_quantized:
        again = "fused, and quantised again" if quantization else "written so: the model is larger than the base"
        print(f"{run.base.name} is quantised: it is dequantised to be {again}")
    export = full_model.export_full_model(run, expert, description)
    if quantization is None:
        _report_rounding(run, expert, export, None)
    else:
        export = _quantized(run, expert, export, quantization)
    write_export(options.run, export, options.out)
    print(f"{options.out}: a full model; try python -m mlx_lm chat --model {options.out}")
    return 0


def _check_options(options: argparse.Namespace) -> None:
    """Raise UserError for options that exclude each other, and for a folder that exists."""
    if options.out.exists():
        raise UserError(f"{options.out}: exists already; remove it or choose another --out")
    for name in ("q_bits", "q_group_size", "quant_predicate"):
        if getattr(options, name) is not None and not options.quantize:
            raise UserError(f"--{name.replace('_', '-')} is for a quantised model; add -q or leave it out")
    if options.quant_predicate and options.q_bits is not None:
        raise UserError(f"--q-bits: {options.quant_predicate} chooses the bits; leave out one of the two")


def _quantization(options: argparse.Namespace) -> Quantization | None:
    """Return how to quantise; None for a float model. Raises UserError for what mlx does not have."""
    if not options.quantize:
        return None
    from dylora_mlx.exporting.quantize import Quantization, check_quantization

    given = {"bits": options.q_bits, "group_size": options.q_group_size, "recipe": options.quant_predicate}
    quantization = Quantization(**{name: value for name, value in given.items() if value is not None})
    check_quantization(quantization)
    return quantization


def _quantized(run: OpenedRun, expert: Expert, export: Export, quantization: Quantization) -> Export:
    """Quantise an export, and print what that costs: the share of the update that is left, and the skills' losses."""
    from dylora_mlx.exporting import formats, quantize, rounding

    quantized = quantize.quantize_export(run.base, export, quantization)
    _report_rounding(run, expert, quantized.export, quantized.export.content["config.json"]["quantization"])
    manifest = export.manifest
    names = manifest.get("weights") or {manifest["expert"]: 1.0}
    expert_ids = [formats.find_expert(run.pool, run.library, name) for name, weight in names.items() if weight]
    try:
        sources = rounding.served_sources(run, expert_ids)
        fused = quantize.build_model(run.base, quantize.float_weights(export))
        losses = rounding.fused_losses(run, sources, fused, quantized.model)
    except UserError as error:
        console.warn(f"what quantising costs is not measured: {error}")
        losses = []
    for loss in losses:
        print(
            f"{loss.skill}: quantising costs {loss.quantized - loss.fused:+.3f} nats a token, from {loss.fused:.3f} to "
            f"{loss.quantized:.3f} on {loss.documents} held-out documents (the base has {loss.base:.3f})"
        )
    return quantized.export


def _report_rounding(run: OpenedRun, expert: Expert, export: Export, options: dict[str, Any] | None) -> None:
    """Print how much of the expert's update is left in rounded weights, and warn where most of it is not."""
    from dylora_mlx.exporting import full_model, quantize, rounding

    measured = rounding.rounding_by_projection(
        expert, full_model.base_weights(run.base), quantize.float_weights(export), options
    )
    if options is not None and measured:
        shares = ", ".join(f"{name} {each.kept_share:.0%}" for name, each in measured.items())
        print(f"share of the update's energy that the rounded weights keep: {shares}")
    drowned = {name: each for name, each in measured.items() if each.kept_share < DROWNED}
    if drowned:
        numbers = ", ".join(
            f"{name} {each.kept_share:.0%} (update {each.update:.1e}, rounding error {each.error:.1e} root mean square; "
            f"{each.direction:.0%} is left along the update)"
            for name, each in drowned.items()
        )
        few_bits = "the base stores its weights in few bits"
        advice = few_bits if options is None else "more bits or smaller groups keep more"
        console.warn(f"rounding drowns the expert's update. What is left of its energy: {numbers}; {advice}")


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)
