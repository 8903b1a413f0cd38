"""Accuracy on multiple-choice questions: likelihoods one document at a time, choices, intervals and the command."""

from __future__ import annotations

import itertools
import json

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx import evaluate
from dylora_mlx.config import Source
from dylora_mlx.data.questions import Question, read_questions
from dylora_mlx.data.records import Record
from dylora_mlx.errors import UserError
from dylora_mlx.evaluation import questions as evaluation
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.routing.router import forced_routing
from dylora_mlx.training.step.evaluate import evaluate as evaluate_domain

SOURCE = Source(name="quiz", source="quiz.jsonl")


def rows(count: int) -> list[dict]:
    options = [["yes", "no"], ["import", "def", "return value"]]
    return [
        {
            "prompt": f"Question {number}: {'x ' * number}\nAnswer:",
            "completion": f" {options[number % 2][0]}\n",
            "options": options[number % 2],
        }
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def quiz(base) -> list[Question]:
    records = [Record(row, f"quiz.jsonl, line {number}") for number, row in enumerate(rows(5), 1)]
    return read_questions(records, SOURCE, base.tokenizer)


def test_losses_are_those_of_each_document_alone(base, quiz):
    """Packed into rows with others, every option has the loss that the base gives its answer alone."""
    model = RoutedDecoder(base, ["q_proj"], "final")
    domain = evaluation.question_domain("quiz", quiz, 64, 2, 4096)
    losses = [nats for nats, _ in evaluate_domain(model, domain, forced_routing(), 0).documents]
    expected = []
    for document in (document for question in quiz for document in question.documents):
        logits = base.model(mx.array(document.tokens[None, :-1]))[0].astype(mx.float32)
        nats = mx.logsumexp(logits, -1) - mx.take_along_axis(logits, mx.array(document.tokens[1:, None]), -1)[:, 0]
        expected.append(float(np.array(nats)[document.loss_mask[1:]].sum()))
    assert losses == pytest.approx(expected, abs=2e-3)
    plain, _ = evaluation.chosen_options(quiz, losses)
    starts = np.cumsum([0, *(len(question.options) for question in quiz)])
    assert plain == [int(np.argmin(expected[a:b])) for a, b in itertools.pairwise(starts)]


def test_a_long_question_widens_the_row(base, quiz):
    longest = max(len(document.tokens) for question in quiz for document in question.documents)
    domain = evaluation.question_domain("quiz", quiz, 8, 2, 4096)
    assert domain.batches[0].inputs.shape[1] == longest - 1
    assert sum(int(batch.loss_mask.sum()) for batch in domain.batches) == sum(
        int(document.loss_mask.sum()) for question in quiz for document in question.documents
    )
    with pytest.raises(UserError, match=rf"{longest} tokens, and the base reads {longest - 1}"):
        evaluation.question_domain("quiz", quiz, 8, 2, longest - 1)


def test_the_likeliest_option_by_sum_and_by_byte():
    question = Question("x", ["no", "a longer one"], 1, [])
    other = Question("y", ["a", "b", "c"], 0, [])
    assert evaluation.chosen_options([question, other], [2.0, 6.0, 3.0, 1.0, 2.0]) == ([0, 1], [1, 1])


def test_the_interval_is_wilsons():
    assert evaluation.interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert evaluation.interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


@pytest.fixture
def quiz_file(tmp_path):
    path = tmp_path / "quiz.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(40)))
    return path


def test_the_command_reports_base_and_mixture(finished, quiz_file, tmp_path, capsys):
    result = tmp_path / "accuracy.json"
    argv = [
        str(finished),
        "--options",
        "--greedy",
        "--limit",
        "3",
        "--data",
        f"quiz={quiz_file}",
        "--json",
        str(result),
    ]
    assert evaluate.main(argv) == 0
    task = json.loads(result.read_text())["quiz"]
    assert (task["questions"], task["own"], set(task["models"])) == (3, None, {"base", "mixture"})
    right = [0, 0, 0]
    for accuracy in task["models"].values():
        assert accuracy["accuracy"] == pytest.approx(np.mean(np.array(accuracy["chosen"]) == right))
        assert 0 <= accuracy["greedy"] <= 1
    text = capsys.readouterr().out
    assert "quiz" in text
    assert "requests" not in text, "domains without options are passed over"


def test_a_skill_has_a_column_of_its_own_expert(finished, quiz_file, tmp_path):
    """A source under a skill's name is answered by that skill's expert too; generated answers count letter for letter."""
    result = tmp_path / "accuracy.json"
    argv = [str(finished), "--options", "--limit", "2", "--data", f"sql={quiz_file}", "--json", str(result)]
    assert evaluate.main(argv) == 0
    task = json.loads(result.read_text())["sql"]
    assert task["own"] == "sql"
    assert set(task["models"]) == {"base", "mixture", "sql"}
    assert task["models"]["sql"]["greedy"] is None


def test_generated_answers_are_compared_with_the_right_option(finished, quiz, monkeypatch):
    from dylora_mlx.generation.batch import BatchText
    from dylora_mlx.run import run_folder

    run = run_folder.open_run(finished, load_experts=False)
    asked = []

    def answered(model, tokenizer, prompts, sampling, on_done):
        asked.extend(prompts)
        assert sampling.temperature == 0
        texts = [" yes\nQuestion", "import", " no\n", "imports", " yes"]
        return [BatchText(text, [], None) for text in texts]  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation.batch, "generate_texts", answered)
    share = evaluation._generated_share(run, "mixture", quiz, lambda: None)
    assert share == pytest.approx(3 / 5), "yes, import and yes are right; no is another option, and imports is none"
    assert [prompt.ids.tolist() for prompt in asked] == [question.prompt_ids.tolist() for question in quiz]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--options"], "no source has records with a column 'options'"),
        (["--greedy"], "--greedy is for --options"),
        (["--options", "--problems", "x.jsonl", "--allow-code-execution"], "exclude each other"),
        (["--options", "--samples", "2"], "--samples is for --problems"),
        (["--limit", "2"], "--limit is for --problems"),
    ],
)
def test_mistakes_are_one_line(finished, capsys, words, message):
    assert evaluate.main([str(finished), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_run_that_mixes_in_the_logits_generates_no_answers(finished, quiz_file, monkeypatch, capsys):
    from dylora_mlx.run import run_folder

    opened = run_folder.open_run

    def mixing_logits(*arguments, **options):
        run = opened(*arguments, **options)
        run.model.mixing = "logits"
        return run

    monkeypatch.setattr(run_folder, "open_run", mixing_logits)
    problems = quiz_file.with_name("problems.jsonl")
    problems.write_text(json.dumps({"task_id": 1, "text": "x", "code": "x = 1", "test_list": ["assert x"]}) + "\n")
    for options, remedy in (
        (["--options", "--greedy", "--data", f"quiz={quiz_file}"], "leave out --greedy"),
        (["--problems", str(problems), "--allow-code-execution"], "leave out --problems"),
    ):
        assert evaluate.main([str(finished), *options]) == 2
        assert capsys.readouterr().err == f"error: model.mixing: logits has no caches to generate with; {remedy}\n"
