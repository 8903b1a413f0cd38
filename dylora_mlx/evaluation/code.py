"""Code problems: completions of the base, the mixture and every expert, run in the sandbox, and pass@k."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from rich.table import Table

from dylora_mlx.evaluation import problems, sandbox
from dylora_mlx.evaluation.problems import Problem
from dylora_mlx.exporting import formats
from dylora_mlx.generation import decode, stream
from dylora_mlx.generation.decode import TokenRouted
from dylora_mlx.generation.stream import Sampling, TextPiece
from dylora_mlx.model.base.load import Base
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.system import console


class PassAtKSettings(NamedTuple):
    """samples: completions of each problem; k: of pass@k; top_p: for sampling only; seconds: that a program may take."""

    samples: int = 1
    k: Sequence[int] = (1,)
    temperature: float = 0.0
    top_p: float = 0.95
    max_tokens: int = 256
    seconds: float = 5.0
    seed: int = 0


ModelFactory = Callable[[], AbstractContextManager[Any]]
"""Makes a model to generate with; what is folded into the base for it is taken out at the end."""


def model_factories(run: OpenedRun) -> dict[str, ModelFactory]:
    """The base, the mixture, and every expert by itself."""
    routing, names = formats.mixture_routing(run).routing, formats.expert_names(run.pool)

    def alone(column: int) -> ModelFactory:
        gates = np.eye(len(names), dtype=np.float32)[column]
        return lambda: decode.fused_experts(run.base, run.model, gates)

    found: dict[str, ModelFactory] = {name: alone(column) for column, name in enumerate(names)}
    return {
        "base": found.pop(formats.NULL_EXPERT),
        "mixture": lambda: nullcontext(TokenRouted(run.model, routing)),
        **found,
    }


def solve_problems(
    base: Base, way: ModelFactory, asked: list[Problem], how: PassAtKSettings, tick: Callable[[], None]
) -> list[list[sandbox.ProgramResult]]:
    """What became of every completion of every problem."""
    sampling = Sampling(how.temperature, how.top_p if how.temperature else 0.0)
    tokenizer, limits, found = base.tokenizer, sandbox.SandboxLimits(seconds=how.seconds), []
    mx.random.seed(how.seed)
    with way() as model:
        for problem in asked:
            ids = stream.encode_prompt(tokenizer, problem.prompt)
            room = min(how.max_tokens, base.context_length - len(ids))
            results = []
            for _ in range(how.samples):
                text = ""
                if room > 0:
                    pieces = stream.stream_text(model, tokenizer.wrapped, ids, room, sampling, problem.stops)
                    text = "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))
                results.append(sandbox.run_program(problem.program(text), limits))
            found.append(results)
            tick()
    return found


def measure_pass_at_k(
    run: OpenedRun, file: Path, shots: int, limit: int | None, how: PassAtKSettings
) -> dict[str, Any]:
    """pass@k, reasons of failures and passed completions by problem, of the base, the mixture and every expert.

    file: JSONL with MBPP's or HumanEval's columns; shots: MBPP's solved problems before each. Raises UserError for a file
    that cannot be read.
    """
    asked = problems.load_problems(file, shots)[:limit]
    found: dict[str, Any] = {}
    for name, way in model_factories(run).items():
        with console.progress(name, len(asked)) as shown:
            ran = solve_problems(run.base, way, asked, how, shown.advance)
        counts = [(len(results), sum(r.passed for r in results)) for results in ran]
        why = [r.why for results in ran for r in results if not r.passed]
        found[name] = {
            **{f"pass@{k}": problems.mean_pass_at_k(counts, k) for k in how.k},
            "failed": {reason: why.count(reason) for reason in sorted(set(why))},
            "problems": {p.name: passed for p, (_, passed) in zip(asked, counts, strict=True)},
        }
    return found


def print_pass_at_k(found: dict[str, Any], name: str, how: PassAtKSettings) -> None:
    """The table; name: of the file."""
    first, count = f"pass@{how.k[0]}", len(found["base"]["problems"])
    experts = [name for name in found if name not in ("base", "mixture")]
    best = max(experts, key=lambda name: found[name][first], default=None)
    title = f"{count} problems of {name}, {how.samples} completions each, temperature {how.temperature:g}"
    table = Table("", *(f"pass@{k}" for k in how.k), "failures", title=title, title_justify="left")
    for name in ("base", "mixture", *([best] if best else [])):
        label = f"best expert: {name}" if name == best else name
        failed = ", ".join(f"{why} {number}" for why, number in found[name]["failed"].items())
        table.add_row(label, *(f"{found[name][f'pass@{k}']:.1%}" for k in how.k), failed)
    console.render(table)
