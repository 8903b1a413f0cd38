"""Import a mixture as a run: an X-LoRA folder, written by this package or by PEFT, or a PyTorch runtime folder."""

from __future__ import annotations

from pathlib import Path

from dylora_mlx.cli.parser import Parser, check_run_name, run_command
from dylora_mlx.config import Source
from dylora_mlx.errors import UserError

EXAMPLES = """  dylora import-run quickstart-torch --name again
  dylora import-run OWNER/NAME --name theirs --base google/gemma-3-270m --text sql=sql.jsonl --text poems=poems.jsonl
"""


def command(argv: list[str]) -> int:
    parser = Parser("dylora import-run", __doc__, EXAMPLES)
    parser.add_argument("folder", help="folder of the mixture, or its hub id")
    parser.add_argument("--name", required=True, help="name of the run folder")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="parent folder of the run folder")
    parser.add_argument(
        "--base", help="base model, if it is not where the folder says: embedded, a folder, or a hub id"
    )
    parser.add_argument(
        "--text", action="append", default=[], metavar="NAME=SOURCE",
        help="sample text of a skill; also names the experts, in order, of a folder without names (may be repeated)",
    )  # fmt: skip
    options = parser.parse_args(argv)
    if options.base == "":
        raise UserError("--base '': empty; name a base, or leave it out")
    texts = [_parse_text(value) for value in options.text]
    out = options.runs / check_run_name(options.name)
    # Imported after parsing: --help needs no MLX.
    from dylora_mlx.exporting import hub
    from dylora_mlx.importing.run import import_mixture

    run = import_mixture(hub.locate_adapter(options.folder), out, options.base, texts)
    print(f"{len(run.pool)} experts in {out}: {', '.join(record.skill for record in run.pool.records)}")
    return 0


def _parse_text(value: str) -> Source:
    """Parse NAME=SOURCE. Raises UserError for anything else."""
    name, _, source = value.partition("=")
    try:
        return Source(name=name, source=source)
    except ValueError as error:
        raise UserError(f"--text {value}: should be NAME=SOURCE such as sql=sql.jsonl ({error})") from error


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)
