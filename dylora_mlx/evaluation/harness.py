"""lm-evaluation-harness on the device: its tasks, asked of the base, the mixture and single experts of a run."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from datetime import datetime
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from rich.table import Table

from dylora_mlx.errors import UserError
from dylora_mlx.evaluation.code import model_factories
from dylora_mlx.exporting import formats
from dylora_mlx.generation import decode
from dylora_mlx.run.prompt_format import learned_formats
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.system import console
from dylora_mlx.system.files import write_error, write_text

Results = dict[str, Any]
"""What lm-evaluation-harness returns for one model: `results` by task, `groups`, `configs`, `n-samples` and others."""


class HarnessSettings(NamedTuple):
    """Settings of an evaluation. Names and meanings are those of lm-evaluation-harness."""

    num_fewshot: int | None = None
    """Solved examples in each prompt; None for what each task says."""
    limit: int | None = None
    """Documents of each task, the first ones; None for all."""
    apply_chat_template: bool = False
    max_gen_toks: int = 256
    """Maximum number of generated tokens where a task names none."""
    seed: int = 0
    """Seed of sampled answers."""


Tasks = dict[str, Any]
"""The harness's tasks with their data, and groups of tasks, as its TaskManager loads them."""
FEWSHOT_SEED = 1234
"""Seed of the choice of solved examples, and of NumPy: the harness's default."""


def check_installed() -> None:
    """Raise UserError if the package lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError(
            "--tasks needs lm-evaluation-harness, which is not installed; pip install 'dylora-mlx[harness]'"
        )


def load_tasks(names: Sequence[str], include_path: Path | None, num_fewshot: int | None = None) -> Tasks:
    """Load tasks with their data, and build the first prompt of each.

    Args:
        names: names of tasks, groups and tags, which may hold * and ?, or paths of YAML files.
        include_path: a folder with more tasks, which replace those of the same name.
        num_fewshot: solved examples in each prompt; None for what each task says.

    Raises UserError for an unknown name, for a task that cannot be loaded (its data cannot be had, or its YAML file is wrong), and
    for one that runs generated code or needs pictures.
    """
    manager = import_module("lm_eval.tasks").TaskManager(include_path=str(include_path) if include_path else None)
    chosen: list[Any] = []
    for name in names:
        for found in _matching(manager, name, include_path):
            try:
                loaded = manager.load([found])
                tasks = loaded["tasks"]
                for task in tasks.values():
                    _check_supported(task)
                    _build_first_prompt(task, num_fewshot)
            except UserError:
                raise
            except Exception as error:  # data sets, templates and Python code of tasks raise anything
                way = (
                    "; connect to the network once, or give files of your own"
                    if isinstance(error, ConnectionError)
                    else ""
                )
                raise UserError(f"--tasks {found}: cannot be loaded ({_reason(error)}){way}") from error
            group = loaded["groups"].get(found)
            chosen += [group] if group is not None else list(tasks.values())
    try:
        return manager.load(chosen)
    except ValueError as error:  # a task twice, by its name and by that of its group
        raise UserError(f"--tasks: {_reason(error)}; name each task once") from error


def _matching(manager: Any, name: str, include_path: Path | None) -> list[str]:
    """Return the names that a name or pattern stands for. Raises UserError if there are none."""
    if Path(name).suffix == ".yaml" and Path(name).is_file():
        return [name]
    if found := manager.match_tasks([name]):
        return found
    near = get_close_matches(name, manager.all_tasks, 3)
    own = [
        task
        for task, entry in manager.task_index.items()
        if include_path and entry.yaml_path and include_path.resolve() in Path(entry.yaml_path).resolve().parents
    ]
    hints = [
        *([f"did you mean {', '.join(near)}?"] if near else []),
        *([f"{include_path} has {', '.join(sorted(own)) or 'no task that can be read'}"] if include_path else []),
    ]
    raise UserError(
        f"--tasks {name}: lm-evaluation-harness has no such task; {'; '.join(hints) or 'lm-eval ls tasks prints them'}"
    )


def _check_supported(task: Any) -> None:
    """Raise UserError for a task that this command refuses. Most tasks have none of these attributes."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"--tasks {task.task_name}: runs generated code outside of a sandbox; --problems runs MBPP and HumanEval in one"
        )
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"--tasks {task.task_name}: needs a model that reads pictures or sound; leave it out")


def _build_first_prompt(task: Any, num_fewshot: int | None) -> None:
    """Set the number of examples, and find a template that does not fit the data before a model works for hours."""
    own = task.get_config("num_fewshot")
    # As in the harness, a task that says 0 keeps it.
    task.set_config(
        key="num_fewshot", value=own if own is not None and (own == 0 or num_fewshot is None) else num_fewshot or 0
    )
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    task.build_all_requests(limit=1, rank=0, world_size=1)


def _reason(error: Exception) -> str:
    """Return an error's first line, which may be a key alone, with its type."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:300]}" if first else type(error).__name__


def choose_models(run: OpenedRun, experts: Sequence[str], every: bool) -> list[str]:
    """Return the names of the models to evaluate: the base, the mixture, and experts alone.

    Args:
        run: the run.
        experts: names of experts to evaluate too, as `formats.find_expert` takes them.
        every: evaluate all experts.

    Raises UserError for an expert that does not exist, and for a run that mixes experts in the logits.
    """
    decode.check_has_caches(run.model, "leave out --tasks")
    names = formats.expert_names(run.pool)
    named = [formats.find_expert(run.pool, run.library, name) for name in experts]
    expert_ids = range(1, len(names)) if every else dict.fromkeys(named)
    return ["base", "mixture", *(names[expert_id] for expert_id in expert_ids)]


def evaluate_tasks(
    run: OpenedRun, tasks: Tasks, models: Sequence[str], settings: HarnessSettings
) -> dict[str, Results]:
    """Return the harness's results of each model, by its name.

    Raises UserError if a chat template is asked for and neither the base nor a skill has one.
    """
    learned_chats = any(form.kind == "chat" for form in learned_formats(run.library))
    if settings.apply_chat_template and not run.base.tokenizer.chat_template and not learned_chats:
        raise UserError(
            f"--apply-chat-template: {run.base.name} has no chat template, and no skill was learned as a chat; leave it out"
        )
    # mlx-lm's wrapper imports lm-eval, which only this option needs.
    from dylora_mlx.evaluation.harness_model import HarnessModel

    factories, found = model_factories(run), {}
    for name in models:
        with factories[name]() as model:
            lm = HarnessModel(run, name, model, settings.apply_chat_template, settings.max_gen_toks)
            found[name] = _evaluate_model(lm, tasks, settings)
    return found


def _evaluate_model(lm: Any, tasks: Tasks, settings: HarnessSettings) -> Results:
    """As the harness's simple_evaluate, which would load the tasks again and describe the current folder's git repository."""
    started = time.time()
    random.seed(0)
    np.random.seed(FEWSHOT_SEED)
    mx.random.seed(settings.seed)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    results = import_module("lm_eval.evaluator").evaluate(
        lm, tasks, limit=settings.limit, log_samples=False, apply_chat_template=settings.apply_chat_template,
        fewshot_as_multiturn=settings.apply_chat_template,
    )  # fmt: skip
    results["config"] = {
        "model": lm.name, "limit": settings.limit, "num_fewshot": settings.num_fewshot, "seed": settings.seed,
        "apply_chat_template": settings.apply_chat_template, "max_gen_toks": settings.max_gen_toks,
    }  # fmt: skip
    results |= {"date": started, "lm_eval_version": version("lm_eval"), "mlx_lm_version": version("mlx-lm")}
    return results


def write_results(found: dict[str, Results], folder: Path) -> None:
    """Write each model's results as lm-evaluation-harness writes them: FOLDER/MODEL/results_DATE.json.

    Raises UserError if the folder cannot be written to.
    """
    harness, date = import_module("lm_eval.utils"), datetime.now().isoformat().replace(":", "-")
    for name, results in found.items():
        path = folder / harness.sanitize_model_name(name) / f"results_{date}.json"
        text = json.dumps(results, indent=2, default=harness.handle_non_serializable, ensure_ascii=False)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text + "\n")
        except OSError as error:
            raise write_error(path, error, "choose another folder with --output") from error


def to_json(found: dict[str, Results]) -> dict[str, Any]:
    """Return the figures of each task by model, as JSON values; those of groups under the group's name."""
    return {name: {**results["results"], **results.get("groups", {})} for name, results in found.items()}


def print_results(found: dict[str, Results]) -> None:
    """Print a row for each metric of each task, and a column for each model."""
    first, figures = next(iter(found.values())), to_json(found)
    table = Table(title="lm-evaluation-harness, with standard errors", title_justify="left")
    for name in ("task", "documents", "shots", "metric", *found):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for task, values in next(iter(figures.values())).items():
        documents, shots = first["n-samples"].get(task, {}).get("effective", ""), first["n-shot"].get(task, "")
        for key in sorted(key for key in values if "," in key and "_stderr," not in key):
            table.add_row(
                task, str(documents), str(shots), _metric_name(key, first["higher_is_better"].get(task, {})),
                *(_figure(of_model[task], key) for of_model in figures.values()),
            )  # fmt: skip
    console.render(table)


def _metric_name(key: str, higher_is_better: dict[str, bool | None]) -> str:
    """Return a metric as people read it: its filter, if it has one, and which direction is better."""
    metric, _, applied = key.partition(",")
    arrow = {True: " ↑", False: " ↓"}.get(higher_is_better.get(metric), "")  # type: ignore[arg-type]
    return metric + (f" ({applied})" if applied != "none" else "") + arrow


def _figure(values: dict[str, Any], key: str) -> str:
    metric, _, applied = key.partition(",")
    value, error = values[key], values.get(f"{metric}_stderr,{applied}")
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return f"{text} ± {error:.4f}" if isinstance(error, float) else text
