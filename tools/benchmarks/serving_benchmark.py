"""Speed of a served run: tokens per second of 1, 4 and 8 requests at once, and the first token with a cached beginning.

    python tools/benchmarks/serving_benchmark.py runs/quickstart
    python tools/benchmarks/serving_benchmark.py runs/quickstart --requests 16 --tokens 100 --json serving.json

Requests go over HTTP to a server in this process, with the names of the mixture and of three experts in turn. Then
mlx_lm.server's own handler serves the bare base, which has no router and no experts, with the same requests. The prompts are
random words, so that no beginning is shared; the first token is measured with a prompt of 500 tokens, once new and once
known. Besides wall clock time, the processor time of the whole process is shown, which other work on the machine does not
change.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from mlx_lm.server import APIHandler, ModelProvider, ResponseGenerator
from rich.table import Column, Table

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.run import run_folder
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.serving.server import ServerSettings, engine_options, serve
from dylora_mlx.system import console
from dylora_mlx.system.files import check_output_file, write_json

AT_ONCE = (1, 4, 8)
LONG_PROMPT = 500
"""Tokens of the prompt whose first token is timed."""


class Speed(NamedTuple):
    """Speed of some requests."""

    tokens: float
    """Generated tokens per second of wall clock time."""
    tokens_cpu: float
    """Generated tokens per second of processor time."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python tools/benchmarks/serving_benchmark.py", __doc__)
    add = parser.add_argument
    add("run", type=Path, help="run folder")
    add("--requests", type=int, default=16, help="requests of each measurement")
    add("--prompt", type=int, default=30, help="words of each prompt")
    add("--tokens", type=int, default=100, help="tokens to generate for each request")
    add("--repeats", type=int, default=3, help="measurements, of which the median is shown")
    add("--json", type=Path, help="write the results to this file")
    options = parser.parse_args(argv)
    for name in ("requests", "prompt", "tokens", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.json:
        check_output_file(options.json)
    return options


class BaseProvider(ModelProvider):
    """Provides the bare base to mlx_lm.server, in the weights and the dtype of the run."""

    def __init__(self, run: OpenedRun):
        super().__init__(engine_options(ServerSettings("base")))
        self.model_key, self.is_batchable = ("base", None, None), True
        self.model, self.tokenizer = run.base.model, run.base.tokenizer.wrapped
        self.cli_args.allowed_origins = ()
        assert make_prompt_cache(self.model)

    def load(self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None) -> Any:
        return self.model, self.tokenizer

    def load_default(self) -> None:
        pass


@contextmanager
def served_run(run: OpenedRun) -> Iterator[int]:
    """Serve a run within the block, which gets the port."""
    stopping, started, ports = threading.Event(), threading.Event(), []

    def announce(_: str, port: int) -> None:
        ports.append(port)
        started.set()

    settings = ServerSettings("run", port=0, max_prompt_tokens=run.base.context_length)
    thread = threading.Thread(target=serve, args=(run, settings, stopping.is_set, announce))
    thread.start()
    started.wait()
    try:
        yield ports[0]
    finally:
        stopping.set()
        thread.join()


@contextmanager
def served_base(run: OpenedRun) -> Iterator[int]:
    """Serve the bare base with mlx_lm.server's own handler within the block."""
    generator = ResponseGenerator(BaseProvider(run), LRUPromptCache(10))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_QuietHandler, generator))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        generator.stop_and_join()


class _QuietHandler(APIHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def ask(port: int, model: str, prompt: str, tokens: int) -> int:
    """Send a request and return the number of generated tokens."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = {"model": model, "prompt": prompt, "max_tokens": tokens}
    connection.request("POST", "/v1/completions", json.dumps(body))
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return int(answer["usage"]["completion_tokens"])


def words(rng: random.Random, count: int) -> str:
    return " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(count))


def measure(port: int, models: list[str], at_once: int, options: argparse.Namespace, rng: random.Random) -> Speed:
    """Return the speed of `options.requests` requests, this many of them at once."""
    prompts = [words(rng, options.prompt) for _ in range(options.requests)]
    wall, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(at_once) as threads:
        jobs = [
            threads.submit(ask, port, models[number % len(models)], prompt, options.tokens)
            for number, prompt in enumerate(prompts)
        ]
        tokens = sum(job.result() for job in jobs)
    return Speed(tokens / (time.perf_counter() - wall), tokens / (time.process_time() - cpu))


def first_token(port: int, model: str, run: OpenedRun, rng: random.Random) -> tuple[float, float]:
    """Return the seconds to the first token of a prompt whose beginning is new, and of one whose beginning is known."""
    ids = run.base.tokenizer.encode_text(words(rng, LONG_PROMPT))[:LONG_PROMPT]
    text, seconds = run.base.tokenizer.decode(ids), []
    for ending in (" first", " second"):
        started = time.perf_counter()
        ask(port, model, text + ending, 1)
        seconds.append(time.perf_counter() - started)
    return seconds[0], seconds[1]


def median_of(repeats: int, work: Callable[[], tuple[float, ...]]) -> list[float]:
    """Return the median of each number over some repeats."""
    return [statistics.median(values) for values in zip(*(work() for _ in range(repeats)), strict=True)]


def command(argv: list[str]) -> int:
    options, rng = parse(argv), random.Random(0)
    run = run_folder.open_run(options.run, load_experts=False)
    results: dict[str, Any] = {}
    names = ["run", *(f"run:{number}" for number in range(1, min(len(run.pool), 3) + 1))]
    for label, server, models in (("run", served_run, names), ("base in mlx_lm.server", served_base, ["base"])):
        with server(run) as port:
            results[label] = _measure_server(run, port, models, options, rng)
    console.render(_table(results, options))
    if options.json:
        write_json(options.json, results)
    return 0


def _measure_server(
    run: OpenedRun, port: int, models: list[str], options: argparse.Namespace, rng: random.Random
) -> dict[str, Any]:
    ask(port, models[0], "warm up", 4)
    speeds = {}
    for at_once in AT_ONCE:
        medians = median_of(options.repeats, partial(measure, port, models, at_once, options, rng))
        speeds[at_once] = Speed(*medians)._asdict()
    new, known = median_of(options.repeats, partial(first_token, port, models[0], run, rng))
    return {"speeds": speeds, "first_token_new": new, "first_token_known": known}


def _table(results: dict[str, Any], options: argparse.Namespace) -> Table:
    title = f"{options.requests} requests of {options.tokens} tokens, median of {options.repeats}"
    table = Table(Column("", no_wrap=True), title=title, title_justify="left")
    for label in results:
        for column in (label, "against 1", "of cpu time", "against 1"):
            table.add_column(column, justify="right")
    for at_once in AT_ONCE:
        cells = []
        for result in results.values():
            one, some = Speed(**result["speeds"][AT_ONCE[0]]), Speed(**result["speeds"][at_once])
            for value, first in zip(some, one, strict=True):
                cells += [f"{value:.0f}", f"{value / first:.2f}"]
        table.add_row(f"{at_once} at once, tokens/s", *cells)
    for name, key in (("new", "first_token_new"), ("known", "first_token_known")):
        cells = []
        for result in results.values():
            cells += [f"{result[key]:.3f}", f"{result[key] / result['first_token_new']:.2f}", "", ""]
        table.add_row(f"first token, {LONG_PROMPT} {name}, s", *cells)
    return table


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
