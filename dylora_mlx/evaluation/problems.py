"""Code problems as their papers pose them: MBPP (Austin et al. 2021) and HumanEval (Chen et al. 2021)."""

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


class Problem(NamedTuple):
    """A prompt, the strings that end a completion, and the program that checks one."""

    name: str
    prompt: str
    stops: tuple[str, ...]
    program: Callable[[str], str]


def load_problems(path: Path, shots: int = 0) -> list[Problem]:
    """Problems of a JSONL file with MBPP's or HumanEval's columns. shots: of MBPP, this many solved problems from the
    beginning of the file go before each prompt and are not asked. Raises UserError."""
    rows = _rows(path)
    kinds = {"mbpp": {"text", "code", "test_list"}, "humaneval": {"prompt", "test", "entry_point"}}
    first = set(rows[0])
    if "prompt" in first and {"code", "test_list"} <= first and "text" not in first:  # MBPP's sanitised half
        rows = [{**row, "text": row["prompt"]} if "prompt" in row else row for row in rows]
        first = set(rows[0])
    kind = next((name for name, columns in kinds.items() if columns <= first), None)
    if kind is None:
        raise UserError(
            f"{path}: columns {', '.join(sorted(first))}; MBPP has text, code, test_list and HumanEval prompt, test, entry_point"
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
    before = "".join(_mbpp_prompt(row) + f"{_unix(row['code'])}\n[DONE]\n\n" for row in rows[:shots])
    return [_mbpp(row, before) for row in rows[shots:]]


def _rows(path: Path) -> list[dict[str, Any]]:
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
    """Whether a value can be written into a prompt or a program; columns that are null are left out."""
    parts = value if column in LISTS and isinstance(value, list) else [value]
    if (column in LISTS and not isinstance(value, list)) or not all(isinstance(part, str) for part in parts):
        return value is None and column in OPTIONAL
    return not any("\ud800" <= letter <= "\udfff" for part in parts for letter in part)


def _mbpp_prompt(row: dict[str, Any]) -> str:
    tests = "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} Your code should pass these tests:\n\n"
        f"{tests}\n[BEGIN]\n"
    )


def _mbpp(row: dict[str, Any], before: str) -> Problem:
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    tests = "\n".join(row["test_list"])

    def program(completion: str) -> str:
        return f"{setup}\n{completion}\n{tests}\n"

    return Problem(f"mbpp/{row.get('task_id', '?')}", before + _mbpp_prompt(row), MBPP_STOPS, program)


def _humaneval(row: dict[str, Any]) -> Problem:
    def program(completion: str) -> str:
        return f"{row['prompt']}{completion}\n{row['test']}\ncheck({row['entry_point']})\n"

    return Problem(str(row.get("task_id", row["entry_point"])), row["prompt"], HUMANEVAL_STOPS, program)


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").strip()


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k completions passes, from `passed` of n samples (Chen et al. 2021,
    equation 1). Raises ValueError for k above n."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, there are {samples}")
    return 1.0 - comb(samples - passed, k) / comb(samples, k)


def mean_pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> float:
    """Mean over problems of (samples, passed)."""
    return sum(pass_at_k(samples, passed, k) for samples, passed in counts) / len(counts)
