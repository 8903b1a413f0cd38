"""Write a commented config for files or folders, after a look at what is in them."""

from __future__ import annotations

import sys
from pathlib import Path

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.errors import UserError
from dylora_mlx.system.files import check_output_file, write_text

EXAMPLES = """\
  dylora init notes/                                 my.yaml, with a skill for each kind of text in a folder
  dylora init notes/ tickets.jsonl faq.parquet       and for each file of records
  dylora init scripts/ --out scripts.yaml --model.base google/gemma-3-270m
"""


def command(argv: list[str]) -> int:
    parser = Parser("dylora init", __doc__, EXAMPLES)
    add = parser.add_argument
    add("sources", metavar="SOURCE", nargs="+",
        help="file, folder, pattern such as data/*.jsonl, or hub data set; in the order in which they are to be learned")  # fmt: skip
    add("--out", type=Path, default=Path("my.yaml"), metavar="FILE", help="config to write")
    add("--force", action="store_true", help="replace the file if it exists")
    add("--model.base", dest="base", default="embedded", metavar="BASE",
        help="base model: embedded, a folder, a .gguf file, or a hub id; only its tokenizer is loaded")  # fmt: skip
    options = parser.parse_args(argv)
    if options.out.suffix.lower() not in (".yaml", ".yml"):
        raise UserError(f"--out {options.out}: a config's name ends in .yaml")
    check_output_file(options.out)
    if options.out.exists() and not options.force:
        raise UserError(f"{options.out}: exists already; --force replaces it, --out writes another file")
    # Imported after parsing: --help needs no MLX.
    from dylora_mlx.model.base.load import load_tokenizer
    from dylora_mlx.run.propose import propose
    from dylora_mlx.system.console import info

    proposal = propose(options.sources, options.base, load_tokenizer(options.base), options.out.parent)
    write_text(options.out, proposal.text)
    for candidate in proposal.candidates:
        if candidate.problem:
            info(f"{candidate.source.name}: left out: {candidate.problem}", style="yellow")
        else:
            limit = candidate.source.limit
            limited = f", {limit:,} of them drawn" if limit is not None else ""
            info(
                f"{candidate.source.name}: {len(candidate.lengths):,} documents to learn from{limited}, {candidate.tokens:,} tokens"
            )
    count = len(proposal.config.skills)
    info(f"{options.out}: {count} skill{'s' * (count != 1)}, and why; edit it as you like")
    info(f"next: dylora plan {options.out}                               similarities, decisions, memory and time")
    info(f"then: python -m dylora_mlx.train --config {options.out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
