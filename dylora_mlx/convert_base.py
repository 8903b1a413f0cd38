"""Convert a model to a folder for model.base, mlx-lm and transformers: a GGUF file (LM Studio, llama.cpp, an Ollama
blob), or a Gemma 3 checkpoint with vision, whose text model is extracted."""

from __future__ import annotations

from pathlib import Path

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.errors import UserError

EXAMPLES = """  dylora convert-base gemma-3-270m.Q4_K_M.gguf --out gemma-3-270m-q4
  dylora convert-base ~/.ollama/models/blobs/sha256-NUMBER --out llama --dtype bfloat16
  dylora convert-base google/gemma-3-4b-pt --out gemma-3-4b-text
  python -m dylora_mlx.train --config gemma3-270m --model.base gemma-3-4b-text
"""


def command(argv: list[str]) -> int:
    parser = Parser("dylora convert-base", __doc__, EXAMPLES)
    parser.add_argument("base", help="a GGUF file, or the folder or hub id of a Gemma 3 checkpoint with vision")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights of a GGUF file (default: the smallest that is exact, float32 for quantised weights)",
    )  # fmt: skip
    options = parser.parse_args(argv)
    if options.out.exists() or options.out.is_symlink():
        raise UserError(f"{options.out}: exists already; remove it or choose another --out")
    # Imported after parsing: --help needs no MLX.
    from dylora_mlx.exporting import text_model
    from dylora_mlx.exporting.folder import write_folder
    from dylora_mlx.model.base.load import locate_base
    from dylora_mlx.model.gguf.convert import convert
    from dylora_mlx.model.gguf.reader import is_gguf

    path = Path(options.base).expanduser()
    if is_gguf(path):
        convert(path, options.out, options.dtype)
        print(f"{options.out}: a base; give it in model.base, to mlx-lm or to transformers")
        return 0
    folder = locate_base(options.base)
    if options.dtype is not None:
        raise UserError("--dtype: only for GGUF files; the weights of a folder keep their stored values")
    write_folder(options.out, text_model.text_model_content(folder), {"kind": "text-model"})
    print(f"{options.out}: a Gemma 3 text model; give it in model.base")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)
