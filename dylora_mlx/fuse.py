"""Fuse one expert or a blend into the base, as a model that mlx_lm.generate, mlx_lm.server and LM Studio load."""

from __future__ import annotations

from pathlib import Path

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.errors import UserError

EXAMPLES = """  dylora fuse runs/quickstart --expert sql --out sql-model
  dylora fuse runs/quickstart --blend sql=0.7,flask=0.3 --out both
  python -m mlx_lm generate --model sql-model --prompt "SELECT"
"""


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
    options = parser.parse_args(argv)
    if options.out.exists():
        raise UserError(f"{options.out}: exists already; remove it or choose another --out")
    # Imported after parsing: --help needs no MLX.
    from dylora_mlx.exporting import full_model
    from dylora_mlx.exporting.write import (
        expert_to_fuse,
        open_for_export,
        write_export,
    )

    run = open_for_export(options.run, "auto", options.unfinished)
    expert, description = expert_to_fuse(run, options.expert, options.blend)
    write_export(options.run, full_model.export_full_model(run, expert, description), options.out)
    print(f"{options.out}: a full model; try python -m mlx_lm generate --model {options.out} --prompt ...")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)
