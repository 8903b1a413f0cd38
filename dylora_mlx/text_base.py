"""Extract the text model of a Gemma 3 checkpoint with vision into a folder for model.base: dylora text-base BASE --out
FOLDER."""

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
    parser.add_argument("base", help="folder or hub id of a Gemma 3 checkpoint with vision")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    options = parser.parse_args(argv)
    if options.out.exists():
        raise UserError(f"{options.out}: exists already; remove it or choose another --out")
    # Imported after parsing: --help needs no MLX.
    from dylora_mlx.exporting import text_model
    from dylora_mlx.exporting.folder import write_folder
    from dylora_mlx.model.base.load import locate_base

    content = text_model.text_model_content(locate_base(options.base))
    write_folder(options.out, content, {"kind": "text-base"})
    print(f"{options.out}: a Gemma 3 text model; give it in model.base")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)
