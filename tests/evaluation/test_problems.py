"""Prompts and test programs of the MBPP and HumanEval formats, and the pass@k estimator."""

from __future__ import annotations

import itertools
import json

import pytest

from dylora_mlx.errors import UserError
from dylora_mlx.evaluation import problems, sandbox

MBPP = [
    {"task_id": 1, "text": "Add two numbers.", "code": "def add(a, b):\r\n    return a + b", "test_setup_code": "",
     "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]},
    {"task_id": 2, "text": "Square a number.", "code": "def square(x):\n    return x * x", "test_setup_code": "import math",
     "test_list": ["assert square(3) == 9", "assert math.isclose(square(2.0), 4)"]},
]  # fmt: skip
HUMANEVAL = [
    {"task_id": "HumanEval/0", "prompt": 'def double(x):\n    """Twice x."""\n', "entry_point": "double",
     "canonical_solution": "    return 2 * x\n", "test": "def check(candidate):\n    assert candidate(2) == 4\n"},
]  # fmt: skip


def passes(program: str) -> bool:
    return sandbox.run_program(program, sandbox.SandboxLimits(seconds=30.0)).passed


def written(folder, rows):
    path = folder / "problems.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_mbpp_prompts_are_those_of_its_paper(tmp_path):
    first, second = problems.load_problems(written(tmp_path, MBPP))
    assert first.prompt == (
        "You are an expert Python programmer, and here is your task: Add two numbers. Your code should pass these tests:\n\n"
        "assert add(1, 2) == 3\nassert add(0, 0) == 0\n[BEGIN]\n"
    )
    assert first.stops == ("[DONE]",)
    assert passes(first.program(MBPP[0]["code"]))
    assert passes(second.program(MBPP[1]["code"]))
    assert not passes(second.program("def square(x):\n    return x + x"))
    assert not passes(first.program(""))


def test_shots_precede_the_prompt_and_are_not_evaluated(tmp_path):
    (problem,) = problems.load_problems(written(tmp_path, MBPP), shots=1)
    assert problem.name == "mbpp/2"
    assert "[BEGIN]\ndef add(a, b):\n    return a + b\n[DONE]\n\nYou are an expert" in problem.prompt
    with pytest.raises(UserError, match="--shots 2"):
        problems.load_problems(tmp_path / "problems.jsonl", shots=2)


def test_humaneval_continues_its_stub(tmp_path):
    (problem,) = problems.load_problems(written(tmp_path, HUMANEVAL))
    assert problem.prompt == HUMANEVAL[0]["prompt"]
    assert passes(problem.program(HUMANEVAL[0]["canonical_solution"]))
    assert not passes(problem.program("    return 3 * x\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no problem"),
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: not a JSON object"),
        ('{"a": 1}', "MBPP has text, code, test_list"),
        (json.dumps(MBPP[0]) + '\n{"text": "x"}', "line 2: '"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "problems.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        problems.load_problems(path)


@pytest.mark.parametrize(("samples", "passed", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (6, 5, 3)])
def test_pass_at_k_is_the_share_of_draws_with_a_success(samples, passed, k):
    draws = list(itertools.combinations([True] * passed + [False] * (samples - passed), k))
    assert problems.pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_needs_k_samples():
    with pytest.raises(ValueError, match="pass@3"):
        problems.pass_at_k(2, 1, 3)
    assert problems.mean_pass_at_k([(4, 0), (4, 4)], 2) == 0.5
