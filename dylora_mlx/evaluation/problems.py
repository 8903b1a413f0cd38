"""Code problems in the form of their papers: MBPP (Austin et al. 2021) and HumanEval (Chen et al. 2021)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

from dylora_mlx.errors import UserError

MBPP_STOPS = ("[DONE]",)
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@")

LISTS, OPTIONAL = ("test_list", "test_imports"), ("test_setup_code", "test_imports")
"""Columns that hold a list of text, and columns that may be missing or null."""


class Problem(NamedTuple):
    """One code problem."""

    name: str
    prompt: str
    stops: tuple[str, ...]
    """Strings that end a completion."""
    program: Callable[[str], str]
    """Turns a completion into the program that checks it."""


def load_problems(path: Path, shots: int = 0) -> list[Problem]:
    """Read the problems of a JSONL file with the columns of MBPP or HumanEval.

    Args:
        path: the file.
        shots: MBPP only: this many problems from the beginning of the file precede every prompt, solved, and are not
            problems themselves.

    Raises UserError for an unreadable file, for missing columns, and for a value of the wrong type.
    """
    rows = _rows(path)
    kinds = {"mbpp": {"text", "code", "test_list"}, "humaneval": {"prompt", "test", "entry_point"}}
    present = set(rows[0])
    # MBPP's sanitized half names its text column "prompt".
    if "prompt" in present and {"code", "test_list"} <= present and "text" not in present:
        rows = [{**row, "text": row["prompt"]} if "prompt" in row else row for row in rows]
        present = set(rows[0])
    kind = next((name for name, columns in kinds.items() if columns <= present), None)
    if kind is None:
        raise UserError(
            f"{path}: columns {', '.join(sorted(present))}; MBPP has text, code, test_list and HumanEval prompt, test, entry_point"
        )
    for number, row in enumerate(rows, 1):
        for column in kinds[kind] - row.keys():
            raise UserError(f"{path}, line {number}: '{column}' is missing")
        for column in (*sorted(kinds[kind]), "test_setup_code", "test_imports"):
            if not _fits(row.get(column), column):
                raise UserError(
                    f"{path}, line {number}: '{column}' is not {'a list of text' if column in LISTS else 'text'}"
                )
    if kind == "humaneval":
        return [_humaneval(row) for row in rows]
    if shots >= len(rows):
        raise UserError(f"--shots {shots}: {path} has {len(rows)} problems, leave some to ask")
    solved = "".join(_mbpp_prompt(row) + f"{_unix(row['code'])}\n[DONE]\n\n" for row in rows[:shots])
    return [_mbpp(row, solved) for row in rows[shots:]]


def _rows(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a JSONL file. Raises UserError for a malformed line and for an empty file."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read; give a JSONL file of problems") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: holds no problem")
    return rows


def _fits(value: Any, column: str) -> bool:
    """Return whether a value has its column's type and can be written into a prompt or a program.

    Lone surrogates cannot be encoded. Null is accepted for optional columns, which are then left out.
    """
    parts = value if column in LISTS and isinstance(value, list) else [value]
    if (column in LISTS and not isinstance(value, list)) or not all(isinstance(part, str) for part in parts):
        return value is None and column in OPTIONAL
    return not any("\ud800" <= letter <= "\udfff" for part in parts for letter in part)


def _mbpp_prompt(row: dict[str, Any]) -> str:
    """Return the prompt of the MBPP paper: the task, its tests and [BEGIN]."""
    tests = "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} Your code should pass these tests:\n\n"
        f"{tests}\n[BEGIN]\n"
    )


def _mbpp(row: dict[str, Any], solved: str) -> Problem:
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    tests = "\n".join(row["test_list"])

    def program(completion: str) -> str:
        return f"{setup}\n{completion}\n{tests}\n"

    return Problem(f"mbpp/{row.get('task_id', '?')}", solved + _mbpp_prompt(row), MBPP_STOPS, program)


def _humaneval(row: dict[str, Any]) -> Problem:
    def program(completion: str) -> str:
        return f"{row['prompt']}{completion}\n{row['test']}\ncheck({row['entry_point']})\n"

    return Problem(str(row.get("task_id", row["entry_point"])), row["prompt"], HUMANEVAL_STOPS, program)


def _unix(text: str) -> str:
    """Return text with line breaks as LF, without surrounding blanks."""
    return text.replace("\r\n", "\n").strip()


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the unbiased estimate of the chance that one of k completions passes.

    It rests on `passed` of `samples` completions (Chen et al. 2021, equation 1). Raises ValueError unless 1 <= k <=
    samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, there are {samples}")
    return 1.0 - comb(samples - passed, k) / comb(samples, k)


def mean_pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> float:
    """Return the mean pass@k over problems, each given as (samples, passed)."""
    return sum(pass_at_k(samples, passed, k) for samples, passed in counts) / len(counts)
