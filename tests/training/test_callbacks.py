"""Callbacks of programs: the events of a run with their values, and exceptions that end it with a checkpoint to go on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import dylora_mlx
from dylora_mlx import Callback, DecisionEvent, EvaluationEvent, Failure, SkillEvent, StepEvent, UserError, train
from tests.conftest import FEW, SMALL_BASE

TEXT = f"""
skills: [{{name: requests, source: {FEW}/requests}}, {{name: requests_more, source: {FEW}/requests_more}}]
growth: {{base_skill: null, threshold: 0.5, dense_steps: 1, anneal_steps: 1, when_known: refine}}
model: {{base: {SMALL_BASE}}}
data: {{max_seq_length: 256}}
training: {{max_steps: 3, steps_per_eval: 2, save_every: 50, memory_tokens: 512}}
log: {{steps_per_report: 1}}
"""


class Noting(Callback):
    """Keeps every event, and raises at the given number of an event's kind."""

    def __init__(self, fails: str = "", number: int = 1, error: Exception | None = None):
        self.events: list = []
        self.fails, self.number, self.error = fails, number, error or ValueError("no\nroom")

    def note(self, kind: str, event: object) -> None:
        self.events.append(event)
        if kind == self.fails:
            self.number -= 1
            if self.number == 0:
                raise self.error

    def on_step(self, event: StepEvent) -> None:
        self.note("on_step", event)

    def on_evaluation(self, event: EvaluationEvent) -> None:
        self.note("on_evaluation", event)

    def on_decision(self, event: DecisionEvent) -> None:
        self.note("on_decision", event)

    def on_skill(self, event: SkillEvent) -> None:
        self.note("on_skill", event)


def learn(folder: Path, *callbacks: Callback) -> Path:
    (folder / "small.yaml").write_text(TEXT)
    dylora_mlx.learn(folder / "small.yaml", runs_folder=folder, quiet=True, callbacks=callbacks)
    return folder / "small"


def records(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


class OnlySteps(Callback):
    """Defines one method; the others do nothing."""

    def __init__(self):
        self.steps = 0

    def on_step(self, event: StepEvent) -> None:
        self.steps += 1


@pytest.fixture(scope="module")
def noted(tmp_path_factory) -> tuple[Path, list, OnlySteps]:
    noting, steps = Noting(), OnlySteps()
    run = learn(tmp_path_factory.mktemp("noted"), noting, steps)
    return run, noting.events, steps


def test_events_have_the_values_of_the_records(noted):
    run, events, only = noted
    written = records(run, "metrics.jsonl")
    steps = [e for e in events if isinstance(e, StepEvent)]
    expected = [(r["step"], r["skill"], r["lm_loss"], r["learning_rate"]) for r in written if "train_loss" in r]
    assert [(e.step, e.skill, e.loss) for e in steps] == [each[:3] for each in expected]
    assert [e.learning_rate for e in steps] == pytest.approx([each[3] for each in expected])
    assert [e.skill_step for e in steps] == [1, 2, 3, 1, 2, 3]
    assert only.steps == 6
    matrix = json.loads((run / "results.json").read_text())["matrix"]
    after = [e for e in events if isinstance(e, EvaluationEvent) and e.after_skill]
    assert [(e.step, e.skill, e.losses) for e in after] == [
        (0, None, matrix[0]), (3, "requests", matrix[1]), (6, "requests_more", matrix[2]),
    ]  # fmt: skip
    within = [e for e in events if isinstance(e, EvaluationEvent) and not e.after_skill]
    assert [(e.step, *e.losses) for e in within] == [
        (2, "requests"), (3, "requests"), (5, "requests_more"), (6, "requests_more"),
    ]  # fmt: skip
    decisions = [(e.step, e.decision.skill, e.decision.action) for e in events if isinstance(e, DecisionEvent)]
    assert decisions == [(0, "requests", "create"), (3, "requests_more", "refine")]
    skills = [e for e in events if isinstance(e, SkillEvent)]
    assert [e[:4] for e in skills] == [(3, "requests", "create", 1), (6, "requests_more", "refine", 1)]
    assert [(e.base_loss, e.loss) for e in skills] == [
        (matrix[0][e.skill], matrix[n][e.skill]) for n, e in enumerate(skills, 1)
    ]
    kinds = [type(e).__name__ for e in events]
    assert kinds[:3] == ["EvaluationEvent", "DecisionEvent", "StepEvent"]
    assert kinds[-2:] == ["EvaluationEvent", "SkillEvent"]


@pytest.mark.parametrize(
    ("event", "number", "step"),
    [("on_step", 2, 2), ("on_decision", 1, 1), ("on_skill", 2, 6)],
)
def test_an_exception_ends_the_run_with_a_checkpoint_to_go_on_from(noted, tmp_path, event, number, step):
    failing, other = Noting(event, number), OnlySteps()
    with pytest.raises(Failure) as raised:
        learn(tmp_path, failing, other)
    run = tmp_path / "small"
    assert str(raised.value) == (
        f"callback Noting.{event} raised ValueError: no room; stopped at step {step}; nothing is lost, "
        f"go on with: python -m dylora_mlx.train --resume {run}"
    )
    assert raised.value.__cause__ is failing.error
    assert json.loads((run / "checkpoints" / f"step-{step:06d}" / "trainer.json").read_text())["step"] == step
    assert train.main(["--resume", str(run), "--quiet"]) == 0
    ours, theirs = (folder / "checkpoints/final/MANIFEST.json" for folder in (run, noted[0]))
    assert json.loads(ours.read_text()) == json.loads(theirs.read_text())


def test_a_refinement_is_resumed_from_before_it(noted, tmp_path):
    with pytest.raises(Failure, match=r"callback Noting\.on_step raised OSError: disk; stopped at step 5"):
        learn(tmp_path, Noting("on_step", 5, OSError("disk")))
    assert [folder.name for folder in sorted((tmp_path / "small/checkpoints").glob("step-*"))][-1] == "step-000003"
    assert train.main(["--resume", str(tmp_path / "small"), "--quiet"]) == 0
    ours, theirs = (folder / "checkpoints/final/MANIFEST.json" for folder in (tmp_path / "small", noted[0]))
    assert json.loads(ours.read_text()) == json.loads(theirs.read_text())


def test_what_is_no_callback_is_refused_before_anything_is_written(tmp_path):
    for wrong, message in ((Noting, "the class Noting"), (print, "<built-in function print>")):
        with pytest.raises(UserError, match=f"^callbacks: {message} is not an object of a class that inherits from"):
            learn(tmp_path, wrong)
    assert not (tmp_path / "small").exists()


def test_a_new_skill_has_events_too(noted, tmp_path):
    shutil.copytree(noted[0], tmp_path / "small")
    noting = Noting()
    dylora_mlx.load(tmp_path / "small").add_skill(f"{FEW}/sql", "sql", quiet=True, callbacks=[noting])
    assert [e.skill for e in noting.events if isinstance(e, SkillEvent)] == ["sql"]
