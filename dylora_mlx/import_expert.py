"""Import a LoRA adapter trained elsewhere as a frozen expert of a finished run."""

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
    parser.add_argument("run", type=Path, help="run folder of a finished run")
    parser.add_argument("adapter", help="PEFT LoRA folder, mlx-lm adapter folder, or hub id of either")
    parser.add_argument("--name", required=True, help="name of the skill")
    parser.add_argument(
        "--text",
        required=True,
        metavar="SOURCE",
        help="sample text of the skill that the router is fitted to, as in a config's source",
    )
    parser.add_argument(
        "--preset",
        default="none",
        choices=["none", "mbpp", "code_alpaca", "alpaca", "sharegpt"],
        help="prompt and completion templates for --text, as in a config's preset",
    )
    parser.add_argument(
        "--same-base",
        action="store_true",
        help="accept an adapter whose base has another name than the run's; only if both are the same model",
    )
    options = parser.parse_args(argv)
    try:
        text = Source(name=options.name, source=options.text, preset=options.preset)
    except ValueError as error:
        raise UserError(f"--name or --text: {error}") from error
    # Imported after parsing: --help needs no MLX.
    from dylora_mlx.exporting import hub
    from dylora_mlx.importing.expert import import_adapter

    imported = import_adapter(options.run, hub.locate_adapter(options.adapter), text, options.same_base)
    print(
        f"expert {imported.expert_id} is {options.name}. Held-out text of it: base {imported.base_loss:.3f}, "
        f"mixture {imported.mixture_loss:.3f}, the expert alone {imported.expert_loss:.3f} nats a token; it takes "
        f"{imported.taken_share:.1%} of the other skills' remembered tokens"
    )
    print(f"the run as it was is kept in {options.run}/checkpoints/before-{options.name}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)
