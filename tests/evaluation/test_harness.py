"""Tasks of lm-evaluation-harness from files, asked of a finished run by the command; what it refuses. Needs lm-eval."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dylora_mlx import evaluate
from dylora_mlx.errors import UserError
from dylora_mlx.evaluation import harness
from dylora_mlx.run import run_folder

pytestmark = pytest.mark.export
pytest.importorskip("lm_eval")
FILES = Path(__file__).parent / "tasks"
QUESTIONS = [json.loads(line) for line in (FILES / "next_line.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def own_tasks_read_once() -> Iterator[None]:
    """The harness's own fifteen thousand tasks are indexed once, not for each command."""
    from lm_eval.tasks._index import TaskIndex

    build = TaskIndex.build
    own = cache(lambda root: build([root]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(lambda paths: {**own(paths[0]), **build(paths[1:])}))
        yield


@pytest.fixture(autouse=True)
def tasks(tmp_path, monkeypatch) -> Path:
    """The example's tasks and their data, in the current folder; data sets are prepared in a cache of their own."""
    folder = tmp_path / "tasks"
    shutil.copytree(FILES, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


@pytest.fixture(scope="module")
def opened(finished) -> run_folder.OpenedRun:
    return run_folder.open_run(finished, load_experts=False)


def told(capsys, *arguments: Any) -> tuple[int, str, str]:
    code = evaluate.main([str(argument) for argument in arguments])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_figures_are_those_of_the_likelihoods(finished, opened, tasks, capsys):
    """Accuracy, bits and exact matches of base, mixture and an expert, computed here from the model's own answers."""
    from types import SimpleNamespace

    from dylora_mlx.evaluation.code import model_factories
    from dylora_mlx.evaluation.harness_model import HarnessModel

    code, out, err = told(
        capsys, finished, "--tasks", "next_line*", "--include-path", tasks, "--expert", "sql", "--json", "found.json",
        "--output", "results", "--limit", 7,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(Path("found.json").read_text())
    assert list(found) == ["base", "mixture", "sql"]
    questions = QUESTIONS[:7]
    for name, figures in found.items():
        with model_factories(opened)[name]() as model:
            lm = HarnessModel(opened, name, model)
            pairs = [(question["context"], ending) for question in questions for ending in question["endings"]]
            scores = [score for score, _ in lm.loglikelihood([SimpleNamespace(args=pair) for pair in pairs])]
            texts = [question["context"] + question["endings"][question["label"]] for question in questions]
            whole = lm.loglikelihood_rolling([SimpleNamespace(args=(text,)) for text in texts])
        right = sum(
            (scores[2 * number] < scores[2 * number + 1]) == bool(question["label"])
            for number, question in enumerate(questions)
        )
        assert figures["next_line"]["acc,none"] == pytest.approx(right / len(questions))
        bits = -sum(whole) / sum(len(text.encode()) for text in texts) / math.log(2)
        assert figures["next_line_text"]["bits_per_byte,none"] == pytest.approx(bits, abs=1e-4)
        assert 0 <= figures["next_line_written"]["exact_match,none"] <= 1
        (file,) = Path("results", name).glob("results_*.json")
        written = json.loads(file.read_text())
        assert written["results"]["next_line"] == figures["next_line"]
        assert written["n-samples"]["next_line"] == {"original": 12, "effective": 7}
        assert (written["config"]["model"], written["config"]["limit"]) == (name, 7)
        assert written["configs"]["next_line_written"]["generation_kwargs"]["until"] == ["\n"]
    row = next(line for line in out.splitlines() if "acc ↑" in line)
    for name in found:
        assert f"{found[name]['next_line']['acc,none']:.4f} ± " in row


def test_the_first_answer_is_written_exactly(opened, tasks, monkeypatch):
    """Answers reach the harness's metrics: a model that is made to write the right lines matches all of them."""
    from dylora_mlx.evaluation import harness_model
    from dylora_mlx.generation.batch import BatchText

    answers = [question["endings"][question["label"]] for question in QUESTIONS]
    monkeypatch.setattr(
        harness_model, "generate_texts", lambda *_: [BatchText(answer, [], None) for answer in answers]  # type: ignore[arg-type]
    )  # fmt: skip
    loaded = harness.load_tasks(["next_line_written"], tasks)
    found = harness.evaluate_tasks(opened, loaded, ["mixture"], harness.HarnessSettings())
    assert found["mixture"]["results"]["next_line_written"]["exact_match,none"] == 1.0
    monkeypatch.setattr(harness_model, "generate_texts", lambda *_: [BatchText("x", [], None)] * 12)  # type: ignore[arg-type]
    found = harness.evaluate_tasks(opened, loaded, ["mixture"], harness.HarnessSettings())
    assert found["mixture"]["results"]["next_line_written"]["exact_match,none"] == 0.0


def test_examples_come_before_each_question(opened, tasks, monkeypatch):
    from dylora_mlx.evaluation.harness_model import HarnessModel

    contexts = []
    monkeypatch.setattr(
        HarnessModel,
        "loglikelihood",
        lambda _, requests: contexts.extend(request.args[0] for request in requests) or [(0.0, False)] * len(requests),
    )
    loaded = harness.load_tasks(["next_line.yaml"], None, 2)
    found = harness.evaluate_tasks(opened, loaded, ["base"], harness.HarnessSettings(num_fewshot=2, limit=1))
    assert found["base"]["n-shot"]["next_line"] == 2
    assert contexts[0].endswith(QUESTIONS[0]["context"])
    solved = [question["context"] + question["endings"][question["label"]] for question in QUESTIONS[1:]]
    assert sum(text in contexts[0] for text in solved) == 2


def test_a_group_of_tasks(opened, tasks):
    Path("both.yaml").write_text(f"{GROUP}aggregate_metric_list: [{{metric: acc, weight_by_size: true}}]\n")
    changed("next_line_text.yaml", Path("next_line_text.yaml").read_text(), Path("next_line.yaml").read_text())
    changed("next_line_text.yaml", "task: next_line", "task: next_line_text")
    found = harness.evaluate_tasks(
        opened, harness.load_tasks(["both"], tasks), ["base"], harness.HarnessSettings(limit=4)
    )
    figures = harness.to_json(found)["base"]
    assert figures["both"]["acc,none"] == figures["next_line"]["acc,none"] == figures["next_line_text"]["acc,none"]


def test_every_expert_or_the_named_ones(opened):
    assert harness.choose_models(opened, [], False) == ["base", "mixture"]
    assert harness.choose_models(opened, [], True) == ["base", "mixture", "requests", "sql"]
    assert harness.choose_models(opened, ["expert_2", "requests_more", "sql"], False) == [
        "base",
        "mixture",
        "sql",
        "requests",
    ]
    with pytest.raises(UserError, match="no expert 'cobol' in this run"):
        harness.choose_models(opened, ["cobol"], False)


def changed(name: str, old: str, new: str) -> None:
    text = Path(name).read_text()
    assert old in text
    Path(name).write_text(text.replace(old, new))


GROUP = "group: both\ntask: [next_line, next_line_text]\n"
MISTAKES = [
    (["next_lime"], None, "--tasks next_lime: lm-evaluation-harness has no such task; did you mean next_line"),
    (["arc_eazy"], None, "arc_easy"),
    (["xyzzy*"], None, "tasks has next_line, next_line_text, next_line_written"),
    (["arc_easy"], None, "; connect to the network once, or give files of your own"),
    (["both,next_line"], lambda: Path("both.yaml").write_text(GROUP), "--tasks: "),
    (["humaneval"], None, "--tasks humaneval: "),
    (["next_line"], lambda: Path("next_line.jsonl").unlink(), "next_line.jsonl"),
    (["next_line"], lambda: changed("next_line.yaml", "{{context}}", "{{context"), "--tasks next_line: cannot be loaded"),
    (["next_line"], lambda: changed("next_line.yaml", "task: next_line", "task: [next_line"), "has no such task"),
    (["next_line", "--expert", "cobol"], None, "no expert 'cobol' in this run"),
    (["next_line", "--apply-chat-template"], None, "has no chat template, and no skill was learned as a chat"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "damage", "message"), MISTAKES, ids=[message for *_, message in MISTAKES])
def test_mistakes_are_one_line(finished, tasks, capsys, words, damage, message):
    if damage is not None:
        damage()
    code, out, err = told(capsys, finished, "--include-path", tasks, "--output", "results", "--tasks", *words)
    error = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(error) == 1
    assert message in error[0]
    assert "Traceback" not in err
    assert "±" not in out
    assert not Path("results").exists()
