"""dylora text-base: the text model of a Gemma 3 checkpoint with vision, as a folder that model.base takes."""

from __future__ import annotations

from pathlib import Path

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.errors import UserError

EXAMPLES = """  dylora text-base google/gemma-3-4b-pt --out gemma-3-4b-text
  dylora text-base mlx-community/gemma-3-4b-it-4bit --out gemma-3-4b-4bit
  python -m dylora_mlx.train --config gemma3-270m --model.base gemma-3-4b-4bit
"""


def command(argv: list[str]) -> int:
    parser = Parser("dylora text-base", __doc__, EXAMPLES)
    parser.add_argument("base", help="a folder or a hub id")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    options = parser.parse_args(argv)
    if options.out.exists():
        raise UserError(f"{options.out}: exists already; remove it or choose another --out")
    from dylora_mlx.exporting import text_model
    from dylora_mlx.exporting.folder import write_folder
    from dylora_mlx.model.base.load import locate_base  # only now: --help needs no MLX

    found = text_model.text_model_content(locate_base(options.base))
    write_folder(options.out, found, {"kind": "text-base"})
    print(f"{options.out}: a Gemma 3 text model; give it in model.base")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)
