"""Code problems: completions by the base, the mixture and every expert, run in the sandbox, and their pass@k."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from rich.table import Table

from dylora_mlx.data import encoding
from dylora_mlx.evaluation import problems, sandbox
from dylora_mlx.evaluation.problems import Problem
from dylora_mlx.exporting import formats
from dylora_mlx.generation import batch, decode
from dylora_mlx.generation.batch import BatchPrompt
from dylora_mlx.generation.decode import TokenRouted
from dylora_mlx.generation.stream import Sampling
from dylora_mlx.model.base.load import Base
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.system import console


class PassAtKSettings(NamedTuple):
    """Settings of a pass@k measurement."""

    samples: int = 1
    """Completions per problem."""
    k: Sequence[int] = (1,)
    """The k of each pass@k to report."""
    temperature: float = 0.0
    top_p: float = 0.95
    """Used only for sampling (temperature above 0)."""
    max_tokens: int = 256
    """Maximum number of tokens per completion."""
    seconds: float = 5.0
    """Time limit of one program."""
    seed: int = 0


ModelFactory = Callable[[], AbstractContextManager[Any]]
"""Creates a context manager that yields a model to generate with; experts fused into the base are removed on exit."""


def model_factories(run: OpenedRun) -> dict[str, ModelFactory]:
    """Return a model factory for the base, the mixture, and every expert alone, by name."""
    routing, names = formats.mixture_routing(run).routing, formats.expert_names(run.pool)

    def single_expert(expert_id: int) -> ModelFactory:
        gates = np.eye(len(names), dtype=np.float32)[expert_id]
        return lambda: decode.fused_experts(run.base, run.model, gates)

    experts: dict[str, ModelFactory] = {name: single_expert(expert_id) for expert_id, name in enumerate(names)}
    return {
        "base": experts.pop(formats.NULL_EXPERT),
        "mixture": lambda: nullcontext(TokenRouted(run.model, routing)),
        **experts,
    }


def solve_problems(
    base: Base,
    make_model: ModelFactory,
    to_solve: list[Problem],
    settings: PassAtKSettings,
    on_completed: Callable[[], None],
) -> list[list[sandbox.ProgramResult]]:
    """Complete every problem `settings.samples` times and run the completions in the sandbox.

    Args:
        base: the base, for its tokenizer and context length.
        make_model: factory of the model that writes the completions.
        to_solve: the problems.
        settings: sampling and limits.
        on_completed: called after each completion.

    Returns the program results of every problem, in order.
    """
    sampling = Sampling(settings.temperature, settings.top_p if settings.temperature else 0.0)
    tokenizer, limits, prompts = base.tokenizer, sandbox.SandboxLimits(seconds=settings.seconds), []
    for problem in to_solve:
        # As their papers pose them: text to continue, in whatever form the skills were learned.
        ids = encoding.prompt_ids(problem.prompt, tokenizer)
        max_tokens = max(min(settings.max_tokens, base.context_length - len(ids)), 0)
        prompts += [BatchPrompt(ids, max_tokens, problem.stops)] * settings.samples
    mx.random.seed(settings.seed)
    with make_model() as model:
        texts = batch.generate_texts(model, tokenizer.stopping_at(()), prompts, sampling, on_completed)
    each = [problem for problem in to_solve for _ in range(settings.samples)]
    results = [
        sandbox.run_program(problem.program(text.text), limits) for problem, text in zip(each, texts, strict=True)
    ]
    return [results[start : start + settings.samples] for start in range(0, len(results), settings.samples)]


def measure_pass_at_k(
    run: OpenedRun, file: Path, shots: int, limit: int | None, settings: PassAtKSettings
) -> dict[str, Any]:
    """Measure the base, the mixture and every expert; return their figures by name.

    The figures are pass@k, counts of failure reasons, and passed completions per problem. Raises UserError for a file
    that cannot be read, and for a run that mixes experts in the logits.

    Args:
        run: the run to measure.
        file: JSONL with the columns of MBPP or HumanEval.
        shots: MBPP only: solved problems in front of each prompt.
        limit: number of problems to use; None for all.
        settings: sampling and limits.
    """
    decode.check_has_caches(run.model, "leave out --problems")
    to_solve = problems.load_problems(file, shots)[:limit]
    figures: dict[str, Any] = {}
    for name, make_model in model_factories(run).items():
        with console.progress(name, len(to_solve) * settings.samples) as progress:
            results_by_problem = solve_problems(run.base, make_model, to_solve, settings, progress.advance)
        counts = [(len(results), sum(r.passed for r in results)) for results in results_by_problem]
        failures = [r.why for results in results_by_problem for r in results if not r.passed]
        figures[name] = {
            **{f"pass@{k}": problems.mean_pass_at_k(counts, k) for k in settings.k},
            "failed": {reason: failures.count(reason) for reason in sorted(set(failures))},
            "problems": {p.name: passed for p, (_, passed) in zip(to_solve, counts, strict=True)},
        }
    return figures


def print_pass_at_k(figures: dict[str, Any], name: str, settings: PassAtKSettings) -> None:
    """Print the base, the mixture and the best expert as a table. `name` is that of the problem file."""
    metric, count = f"pass@{settings.k[0]}", len(figures["base"]["problems"])
    experts = [name for name in figures if name not in ("base", "mixture")]
    best = max(experts, key=lambda name: figures[name][metric], default=None)
    title = f"{count} problems of {name}, {settings.samples} completions each, temperature {settings.temperature:g}"
    table = Table("", *(f"pass@{k}" for k in settings.k), "failures", title=title, title_justify="left")
    for name in ("base", "mixture", *([best] if best else [])):
        label = f"best expert: {name}" if name == best else name
        failed = ", ".join(f"{reason} {number}" for reason, number in figures[name]["failed"].items())
        table.add_row(label, *(f"{figures[name][f'pass@{k}']:.1%}" for k in settings.k), failed)
    console.render(table)
