"""Generate text from a prompt, or chat, with a trained run."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.errors import UserError

EXAMPLES = """  python -m dylora_mlx.generate runs/quickstart --prompt "SELECT" --temp 0.7
  python -m dylora_mlx.generate runs/quickstart --prompt "import flask" --show-experts
  python -m dylora_mlx.generate runs/quickstart --expert sql --prompt "-- Orders of each customer"
  python -m dylora_mlx.generate runs/quickstart --routing prompt -p "..."    decodes at the cost of the base
  python -m dylora_mlx.generate runs/quickstart --prompts prompts.jsonl --out answers.jsonl
  cat prompt.txt | python -m dylora_mlx.generate runs/quickstart --quiet
  python -m dylora_mlx.generate runs/quickstart                              a prompt at a time, in a terminal
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python -m dylora_mlx.generate", __doc__, EXAMPLES)
    add = parser.add_argument
    add("run", type=Path, help="run folder")
    add("--prompt", "-p", help="the prompt (without one: read standard input from a pipe, or chat in a terminal)")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="JSONL file with a column prompt: answer all of them, several at once",
    )
    add("--out", type=Path, metavar="FILE", help="write the answers to --prompts to this JSONL file")
    add("--max-tokens", "-m", type=int, default=256, help="maximum number of tokens to generate")
    add("--routing", choices=["token", "prompt"], default="token",
        help="choose experts for every token, or once for the prompt, fused into the base, which decodes faster")  # fmt: skip
    add("--expert", metavar="NAME", help="use only this expert: a skill's name, an expert's number, or base")
    add("--temp", type=float, default=0.0, help="sampling temperature; 0 is greedy")
    add(
        "--top-p",
        type=float,
        default=0.0,
        help="sample from the likeliest tokens that together have this probability, 0 to 1; 0 turns it off",
    )
    add(
        "--min-p",
        type=float,
        default=0.0,
        help="sample from tokens at least this likely, relative to the likeliest, 0 to 1; 0 turns it off",
    )
    add("--top-k", type=int, default=0, help="sample from this many likeliest tokens; 0 turns it off")
    add(
        "--repetition-penalty",
        type=float,
        help="penalty on the last 20 tokens, above 0; 1 has no effect, higher values repeat less",
    )
    add("--stop", action="append", default=[], metavar="TEXT", help="stop before this text (may be repeated)")
    add("--seed", type=int, help="seed of the sampling")
    add("--show-experts", action="store_true", help="color each token by its likeliest expert")
    add(
        "--raw",
        "--ignore-chat-template",
        action="store_true",
        help="continue the prompt's text as it is, even if the skills were learned as chats",
    )
    add("--system", "--system-prompt", metavar="TEXT", help="system message; the prompt is then asked as a chat")
    add("--quiet", "-q", action="store_true", help="print only the text")
    add("--json", action="store_true", help="print one JSON object per prompt: text, experts, tokens, speed")
    options = parser.parse_args(argv)
    _check_options(options)
    return options


def _check_options(options: argparse.Namespace) -> None:
    """Check ranges and combinations of options. Raises UserError."""
    bounds = {
        "--max-tokens": options.max_tokens >= 1,
        "--temp": 0 <= options.temp < math.inf,
        "--top-p": 0 <= options.top_p <= 1,
        "--min-p": 0 <= options.min_p <= 1,
        "--top-k": options.top_k >= 0,
        "--repetition-penalty": options.repetition_penalty is None or 0 < options.repetition_penalty < math.inf,
        "--seed": options.seed is None or 0 <= options.seed < 2**31,
    }
    for name, is_valid in bounds.items():
        if not is_valid:
            raise UserError(f"{name} {getattr(options, name[2:].replace('-', '_'))}: out of its range")
    if options.prompts is None and options.out is not None:
        raise UserError("--out is for --prompts; leave it out or add --prompts")
    if options.prompts is not None and (options.prompt is not None or options.show_experts or options.quiet):
        raise UserError(
            "--prompts takes no --prompt, --show-experts or --quiet: it answers in JSON lines; leave them out"
        )
    if "" in options.stop:
        raise UserError("--stop '': an empty text cannot end anything; leave it out")
    if options.quiet and options.json:
        raise UserError("--quiet and --json: one of them is enough; --json prints no other text")
    if options.raw and options.system is not None:
        raise UserError("--raw and --system: raw text has no system message; leave one of them out")
    if options.show_experts and (options.json or options.quiet):
        raise UserError("--show-experts colours text for people; leave out --quiet and --json")


def command(argv: list[str]) -> int:
    options = parse(argv)
    prompt = options.prompt
    if options.prompts is None and prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise UserError("the prompt is empty; give one with --prompt or through a pipe")
    # Imported after parsing: --help needs no MLX.
    import mlx.core as mx
    from rich.console import Console

    from dylora_mlx.generation import terminal
    from dylora_mlx.generation.prompt_file import answer_file, read_prompts
    from dylora_mlx.generation.session import GenerationSettings, Session
    from dylora_mlx.generation.stream import Sampling
    from dylora_mlx.model.base import device
    from dylora_mlx.run import run_folder
    from dylora_mlx.system.console import warn
    from dylora_mlx.system.files import check_output_file

    records = [] if options.prompts is None else read_prompts(options.prompts)
    if options.out is not None:
        check_output_file(options.out)
    console = Console(highlight=False, soft_wrap=True)
    run = run_folder.open_run(options.run, load_experts=False)
    device.set_memory_limits()
    if options.seed is not None:
        mx.random.seed(options.seed)
    sampling = Sampling(options.temp, options.top_p, options.min_p, options.top_k, options.repetition_penalty)
    settings = GenerationSettings(
        options.max_tokens, options.routing, options.expert, sampling, tuple(options.stop), options.raw, options.system
    )  # fmt: skip
    session, output_style = (
        Session(run, settings),
        terminal.OutputStyle(options.show_experts, options.quiet, options.json),
    )
    if session.format.note:
        warn(session.format.note)
    if records:
        answer_file(session, records, options.out)
    elif prompt is None:
        terminal.chat(session, output_style, console)
    else:
        terminal.print_summary(
            session, terminal.print_answer(session, prompt, output_style, console), output_style, console
        )
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
