"""dylora import-expert: an adapter that was trained elsewhere, as a frozen expert of a finished run."""

from __future__ import annotations

from pathlib import Path

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.config import Source
from dylora_mlx.errors import UserError

EXAMPLES = """  dylora import-expert runs/quickstart my-sql-lora --name sql2 --text sql.jsonl
  dylora import-expert runs/quickstart OWNER/NAME --name sql2 --text packaged/sql --same-base
"""


def command(argv: list[str]) -> int:
    parser = Parser("dylora import-expert", __doc__, EXAMPLES)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("adapter", help="a PEFT LoRA folder, an mlx-lm adapter folder, or a hub id of one")
    parser.add_argument("--name", required=True, help="name of the skill")
    parser.add_argument("--text", required=True, metavar="SOURCE", help="text of the skill, as in a config's source")
    parser.add_argument(
        "--preset", default="none", choices=["none", "mbpp", "code_alpaca"], help="how that text is read"
    )
    parser.add_argument(
        "--same-base", action="store_true", help="the adapter's base is the run's, whatever it is called"
    )
    options = parser.parse_args(argv)
    try:
        text = Source(name=options.name, source=options.text, preset=options.preset)
    except ValueError as error:
        raise UserError(f"--name or --text: {error}") from error
    from dylora_mlx.exporting import hub
    from dylora_mlx.importing.expert import import_adapter  # only now: --help needs no MLX

    found = import_adapter(options.run, hub.locate_adapter(options.adapter), text, options.same_base)
    print(
        f"expert {found.expert_id} is {options.name}. Held-out text of it: base {found.base:.3f}, mixture {found.mixture:.3f}, "
        f"the expert alone {found.own:.3f} nats a token; it takes {found.taken:.1%} of the other skills' remembered tokens"
    )
    print(f"the run as it was is kept in {options.run}/checkpoints/before-{options.name}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)
