"""Serve a run behind OpenAI's HTTP API, with a model name for the mixture, for the base and for every expert, and a page."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import math
import os
import sys
from pathlib import Path

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.errors import UserError

EXAMPLES = """  python -m dylora_mlx.serve runs/quickstart                     http://127.0.0.1:8080/v1
  python -m dylora_mlx.serve runs/quickstart --port 9000 --name code
  python -m dylora_mlx.serve runs/quickstart --draft base        speculative decoding, one request at a time
  DYLORA_API_KEY=... python -m dylora_mlx.serve runs/quickstart --host 0.0.0.0
"""
API_KEY_VARIABLE = "DYLORA_API_KEY"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR"]


def size(text: str) -> int:
    """Return the bytes of a size such as 500M or 2G."""
    number, unit = text.rstrip("KMGB").strip(), text[len(text.rstrip("KMGB")) :].removesuffix("B")
    if not number.isdecimal() or unit not in UNITS:
        raise argparse.ArgumentTypeError(f"'{text}' is no size such as 500M or 2G")
    return int(number) * UNITS[unit]


def names(text: str) -> tuple[str, ...]:
    """Return the names of a list with commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python -m dylora_mlx.serve", __doc__, EXAMPLES)
    add = parser.add_argument
    add("run", type=Path, help="run folder")
    add("--name", help="name of the mixture in the API (default: that of the run folder)")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines too")
    add("--port", type=int, default=8080, help="port to listen on; 0 takes a free one")
    add("--api-key", metavar="KEY",
        help=f"key that every request must send (default: {API_KEY_VARIABLE}, which other users of the machine cannot see)")  # fmt: skip
    add("--allowed-hosts", type=names, default=(), metavar="NAMES",
        help="further names of this server in Host headers, with commas, such as that of a proxy")  # fmt: skip
    add("--allowed-origins", type=names, default=(), metavar="ORIGINS",
        help="origins of web pages that may use the server, with commas")  # fmt: skip
    add("--draft", choices=["none", "base"], default="none",
        help="base: the bare base drafts tokens that the mixture checks; requests are served one after another")  # fmt: skip
    add("--num-draft-tokens", type=int, default=3, help="tokens to draft at once")
    add("--temp", type=float, default=0.0, help="sampling temperature of requests that give none; 0 is greedy")
    add("--top-p", type=float, default=1.0, help="top-p of requests that give none")
    add("--top-k", type=int, default=0, help="top-k of requests that give none")
    add("--min-p", type=float, default=0.0, help="min-p of requests that give none")
    add("--max-tokens", type=int, default=512, help="tokens to generate for requests that do not say")
    add("--max-tokens-limit", type=int, default=4096, help="most tokens that a request gets")
    add("--max-prompt-tokens", type=int, help="longest prompt in tokens (default: the base's context)")
    add("--max-body-bytes", type=size, default="4M", help="largest request, such as 500K or 4M")
    add("--decode-concurrency", type=int, default=32, help="requests that generate at once, as one batch")
    add("--prompt-concurrency", type=int, default=8, help="prompts that are read at once")
    add("--max-queue", type=int, default=64, help="requests that wait; more are refused")
    add("--prefill-step-size", type=int, default=2048, help="tokens of a prompt in one step")
    add(
        "--prompt-cache-size",
        type=int,
        default=10,
        help="texts whose caches are kept, for prompts with the same beginning",
    )
    add("--prompt-cache-bytes", type=size, default="1G", help="memory for these caches, such as 500M or 2G")
    add("--log-level", choices=LEVELS, default="INFO", help="DEBUG logs prompts and answers too")
    options = parser.parse_args(argv)
    _check_options(options)
    return options


def _check_options(options: argparse.Namespace) -> None:
    """Check ranges of options. Raises UserError."""
    bounds = {
        "--port": 0 <= options.port < 1 << 16,
        "--temp": 0 <= options.temp < math.inf,
        "--top-p": 0 <= options.top_p <= 1,
        "--min-p": 0 <= options.min_p <= 1,
        "--top-k": options.top_k >= 0,
        "--max-queue": options.max_queue >= 0,
        "--max-prompt-tokens": options.max_prompt_tokens is None or options.max_prompt_tokens >= 1,
        "--prompt-cache-bytes": options.prompt_cache_bytes >= 0,
    }
    for name in ("num-draft-tokens", "max-tokens", "max-tokens-limit", "max-body-bytes", "decode-concurrency",
                 "prompt-concurrency", "prefill-step-size", "prompt-cache-size"):  # fmt: skip
        bounds[f"--{name}"] = getattr(options, name.replace("-", "_")) >= 1
    for name, is_valid in bounds.items():
        if not is_valid:
            raise UserError(f"{name} {getattr(options, name[2:].replace('-', '_'))}: out of its range")
    if options.name is not None and not (options.name.strip() and options.name.isprintable()):
        raise UserError("--name: an empty or unprintable name; give one that clients can send")
    if options.api_key is not None and not (options.api_key.isascii() and options.api_key.strip()):
        raise UserError("--api-key: an empty key, or one that no HTTP header can hold")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def command(argv: list[str]) -> int:
    options = parse(argv)
    # Imported after parsing: --help needs no MLX.
    from dylora_mlx.model.base import device
    from dylora_mlx.run import run_folder
    from dylora_mlx.serving.server import ServerSettings, serve
    from dylora_mlx.system import console, signals

    api_key = options.api_key or os.environ.get(API_KEY_VARIABLE) or None
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(message)s")
    run = run_folder.open_run(options.run, load_experts=False)
    device.set_memory_limits()
    known = {name: value for name, value in vars(options).items() if name in ServerSettings._fields}
    longest = run.base.context_length if options.max_prompt_tokens is None else options.max_prompt_tokens
    known |= {"name": options.name or options.run.resolve().name, "draft": options.draft == "base", "api_key": api_key}
    settings = ServerSettings(**{**known, "max_prompt_tokens": longest})

    def announce(host: str, port: int) -> None:
        if run.checkpoint.name != run_folder.FINAL:
            console.warn(f"{options.run} has not finished: its newest checkpoint, {run.checkpoint.name}, is served")
        if not _is_loopback(options.host) and api_key is None:
            console.warn(f"--host {options.host} without --api-key: whoever reaches this machine can use the server")
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{port}"
        line = f"serving {settings.name} at {address}/v1, with a page at {address}/; Ctrl-C finishes what was asked, and ends"
        print(line, flush=True)

    with signals.defer_signals():
        serve(run, settings, signals.stop_requested, announce)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
