"""The evaluate command, on a run that has finished."""

from __future__ import annotations

import json

import pytest

from dylora_mlx import evaluate
from dylora_mlx.evaluation import sandbox
from dylora_mlx.generation import batch
from dylora_mlx.generation.stream import GenerationSummary
from tests.evaluation.test_problems import MBPP, written


def told(capsys, *arguments: str) -> tuple[int, str, str]:
    code = evaluate.main([*arguments])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_losses_are_those_the_run_ended_with(finished, tmp_path, capsys):
    more = tmp_path / "more.jsonl"
    more.write_text("\n".join(json.dumps({"text": f"SELECT {n} FROM numbers;"}) for n in range(20)))
    code, out, _ = told(capsys, str(finished), "--data", f"more={more}", "--json", str(tmp_path / "found.json"))
    assert code == 0
    assert "perplexity" in out
    found = json.loads((tmp_path / "found.json").read_text())
    expected = json.loads((finished / "results.json").read_text())["test"]
    assert found.keys() == expected.keys() | {"more"}
    assert found["more"]["experts"].keys() == {"base", "requests", "sql"}
    for name, losses in expected.items():
        assert found[name]["base"] == pytest.approx(losses["base"], abs=1e-4)
        assert found[name]["mixture"] == pytest.approx(losses["mixture"], abs=1e-4)
        assert min(found[name]["experts"].values()) <= losses["own_expert"] + 1e-4
        assert found[name]["experts"][found[name]["best"]] == min(found[name]["experts"].values())


def test_pass_at_k_counts_what_passes(finished, tmp_path, capsys, monkeypatch):
    """The mixture is made to answer right, everything else wrong: exactly its share passes."""
    path = written(tmp_path, MBPP)
    right = {"mbpp/1": MBPP[0]["code"], "mbpp/2": "def square(x):\n    return x + x"}
    answers = iter(["def no(): pass"] * 2 + list(right.values()) + ["assert False"] * 4)

    def answer(_model, _tokenizer, prompts, *_):
        return [batch.BatchText(next(answers), [], GenerationSummary(1, 1.0, 1, 1.0, 0.0, "stop")) for _ in prompts]

    monkeypatch.setattr(batch, "generate_texts", answer)
    options = [
        "--problems",
        str(path),
        "--allow-code-execution",
        "--timeout",
        "30",
        "--json",
        str(tmp_path / "found.json"),
    ]
    code, out, _ = told(capsys, str(finished), *options)
    assert code == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["mixture"]["pass@1"] == 0.5
    assert found["mixture"]["problems"] == {"mbpp/1": 1, "mbpp/2": 0}
    assert found["base"]["pass@1"] == 0.0
    assert found["sql"]["failed"] == {"failed": 2}
    assert "50.0%" in out


def test_programs_are_really_generated_and_run(finished, tmp_path, capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(
        sandbox, "run_program", lambda program, limits: ran.append(program) or sandbox.ProgramResult(True)
    )
    options = ["--problems", str(written(tmp_path, MBPP)), "--allow-code-execution", "--limit", "1", "--max-tokens", "4",
               "--samples", "2", "--temp", "1", "--k", "1", "2"]  # fmt: skip
    code, out, _ = told(capsys, str(finished), *options)
    assert code == 0
    assert len(ran) == 2 * 4, "two of base, mixture and both experts"
    assert all("assert add(1, 2) == 3" in program for program in ran)
    assert "pass@2" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problems", "x.jsonl"], "--allow-code-execution"),
        (["--problems", "x.jsonl", "--allow-code-execution", "--k", "2"], "--k 2"),
        (["--problems", "x.jsonl", "--allow-code-execution", "--samples", "4"], "--temp 0"),
        (["--problems", "none.jsonl", "--allow-code-execution"], "none.jsonl: cannot be read"),
        (["--timeout", "0"], "--timeout 0.0"),
        (["--data", "x"], "should be NAME=SOURCE"),
        (["--data", "x=none.jsonl"], "none.jsonl: no such file"),
    ],
)
def test_mistakes_are_one_line(finished, capsys, arguments, message):
    code, _, err = told(capsys, str(finished), *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_tasks_name_the_package_that_they_need(finished, capsys, monkeypatch):
    monkeypatch.setattr("dylora_mlx.evaluation.harness.find_spec", lambda name: None)
    code, out, err = told(capsys, str(finished), "--tasks", "arc_easy")
    assert (code, out) == (2, "")
    assert err == (
        "error: --tasks needs lm-evaluation-harness, which is not installed; pip install 'dylora-mlx[harness]'\n"
    )
