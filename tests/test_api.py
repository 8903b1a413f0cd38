"""The library: a finished run loaded, looked into, taught one more skill; a new one from a config; mistakes in one line."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import dylora_mlx
from dylora_mlx import UserError
from dylora_mlx.config import Config, DataConfig, ModelConfig, Source, TrainingConfig
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.run import run_folder
from dylora_mlx.system import console
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.step.domains import Domain, make_domains
from dylora_mlx.training.step.evaluate import evaluate
from tests.conftest import SMALL, SMALL_BASE


@pytest.fixture(scope="module")
def run(finished) -> dylora_mlx.Run:
    return dylora_mlx.load(finished)


@pytest.fixture(scope="module")
def grown(finished, tmp_path_factory) -> dylora_mlx.Run:
    """A copy of the run with a skill more; the fixture's own is left alone."""
    copy = tmp_path_factory.mktemp("grown") / "small"
    shutil.copytree(finished, copy)
    return dylora_mlx.load(copy).add_skill("packaged/stripe", "stripe", quiet=True, limit=40, rank=2)


def test_names_are_few_and_typed():
    assert set(dylora_mlx.__all__) == {
        "Callback", "Config", "DecisionEvent", "EvaluationEvent", "Failure", "Generated", "RoutedText", "Run", "SkillEvent",
        "Source", "StepEvent", "UserError", "learn", "load", "__version__",
    }  # fmt: skip
    stub = (Path(dylora_mlx.__file__).parent / "__init__.pyi").read_text()
    typed = {
        alias.name for node in ast.walk(ast.parse(stub)) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert typed == set(dylora_mlx.__all__) - {"__version__"}
    for name in dylora_mlx.__all__:
        assert name in dir(dylora_mlx)
        assert getattr(dylora_mlx, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dylora_mlx.nothing  # noqa: B018


def test_importing_loads_nothing_else():
    program = "import sys, dylora_mlx; print([n for n in ('mlx.core', 'rich', 'jsonargparse') if n in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_what_a_run_holds(run, finished):
    assert list(run.experts) == ["requests", "sql"]
    assert run.experts["requests"] == {
        "expert_id": 1, "rank": 8, "alpha": 16.0, "frozen": True, "skills": ["requests", "requests_more"],
    }  # fmt: skip
    assert run.config.data.max_seq_length == 256
    assert run.results["skills"] == ["requests", "sql", "requests_more"]
    assert "requests" in repr(run)
    assert "<td>sql</td>" in run._repr_html_()


def test_a_text_is_routed(run):
    text = "SELECT name FROM users <b>"
    routed = run.route(text)
    assert "".join(routed.tokens) == text
    assert routed.gates.shape == (len(routed.tokens), 3)
    assert np.allclose(routed.gates.sum(-1), 1)
    assert routed.names == ["base", "requests", "sql"]
    assert sum(routed.shares.values()) == pytest.approx(1)
    assert list(routed.shares.values()) == sorted(routed.shares.values(), reverse=True)
    assert set(routed.experts) <= set(routed.names)
    drawn = routed._repr_html_()
    assert "&lt;" in drawn
    assert "<b>" not in drawn


def test_text_is_generated(run):
    made = run.generate("SELECT", 6, temperature=0.7, seed=3)
    assert str(made) == made.text
    assert sum(made.experts.values()) <= made.summary.tokens == 6
    assert run.generate("SELECT", 6, temperature=0.7, seed=3).text == made.text
    forced = run.generate("SELECT", 4, expert="sql")
    assert forced.experts == {}
    assert "".join(getattr(piece, "text", "") for piece in run.stream("SELECT", 4, expert="sql")) == forced.text


def test_many_texts_are_generated_at_once(run):
    prompts = ["SELECT", "import requests", "def f(x):"]
    for options in ({}, {"expert": "sql"}, {"routing": "prompt"}, {"stop": ("e",)}):
        found = run.generate(prompts, 8, **options)
        assert [text.text for text in found] == [run.generate(prompt, 8, **options).text for prompt in prompts]
        assert all(text.summary.prompt_tokens > 0 for text in found)
    assert run.generate([]) == []
    with pytest.raises(dylora_mlx.UserError, match="prompt 2: the prompt has"):
        run.generate(["x", "x " * 3000])


def test_losses_are_those_of_the_results(run):
    found = run.losses()
    for name, loss in run.results["test"].items():
        assert found[name].mixture == pytest.approx(loss["mixture"], abs=1e-6)
        assert found[name].base == pytest.approx(loss["base"], abs=1e-6)
    assert run.losses({"more": "packaged/flask"}, "validation")["more"].tokens > 0


def test_a_skill_is_added(grown, finished, run):
    assert list(grown.experts) == ["requests", "sql", "stripe"]
    assert grown.experts["stripe"]["rank"] == 2
    before, after = run.results, grown.results
    assert after["skills"] == [*before["skills"], "stripe"]
    assert after["matrix"][1:-2] == before["matrix"][1:-1]
    assert after["matrix"][-1].keys() == {*before["matrix"][-1], "stripe"}
    assert "stripe" not in after["matrix"][1]
    assert after["matrix"][-1]["stripe"] < after["matrix"][-2]["stripe"]
    base = evaluate(
        grown._opened.model, _validation(grown, "stripe"), Routing(None, mx.array(1.0)), 0
    ).loss  # fmt: skip
    assert after["matrix"][0]["stripe"] == pytest.approx(base, abs=1e-5)
    assert after["continual"]["forgetting"] is not None


def _validation(run: dylora_mlx.Run, name: str) -> Domain:
    from dylora_mlx.data import stream

    source = next(source for source in run.config.skills if source.name == name)
    skill = stream.prepare_skill(source, run.config.data, run._opened.base.tokenizer, run.config.seed)
    return make_domains({name: skill.validation}, run.config.data.max_seq_length, 1)[name]


def test_earlier_experts_are_as_they_were_and_so_is_the_earlier_state(grown, finished):
    for expert_id in (1, 2):
        name = f"checkpoints/final/experts/expert_{expert_id}/adapters.safetensors"
        assert (grown.folder / name).read_bytes() == (finished / name).read_bytes()
    kept = checkpoint.read(grown.folder / "checkpoints" / "before-stripe")
    assert kept.keys() == checkpoint.read(finished / "checkpoints" / "final").keys()
    assert "stripe" in (grown.folder / "config.yaml").read_text()


def test_an_addition_that_was_stopped_goes_on(finished, tmp_path, capsys):
    copy = tmp_path / "small"
    shutil.copytree(finished, copy)
    began = run_folder.extend_run(copy, Source(name="stripe", source="packaged/stripe", limit=40))
    del began
    assert not (copy / "checkpoints" / "final").exists()
    resumed = run_folder.resume_run(copy)
    assert (resumed.state.skill_index, len(resumed.skills)) == (3, 4)
    del resumed
    # Stopped a moment earlier: the config has the skill, the final checkpoint is still in its place.
    (copy / "checkpoints" / "before-stripe").rename(copy / "checkpoints" / "final")
    assert run_folder.resume_run(copy).state.skill_index == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.add_skill("packaged/stripe", "sql"), "this run has a skill or domain of that name"),
        (lambda run: run.add_skill("packaged/stripe", "a b"), "is not a name"),
        (lambda run: run.add_skill("packaged/stripe", "new", ranks=3), "ranks"),
        (lambda run: run.add_skill("nothing.jsonl", "new"), "nothing.jsonl"),
        (lambda run: run.route(""), "the text is empty"),
        (lambda run: run.route("x " * 40000), "the base reads"),
        (lambda run: run.generate("x", expert="nobody"), "no expert 'nobody'"),
        (lambda run: dylora_mlx.load(run.folder / "checkpoints"), "no run here"),
        (lambda run: dylora_mlx.learn("nothing.yaml"), "nothing.yaml"),
        (lambda run: dylora_mlx.learn(run.config), "needs a name"),
        (lambda run: dylora_mlx.learn("quickstart", options={"training.epoch": 5}), "training.epoch"),
    ],
)
def test_mistakes_are_one_line(run, change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = checkpoint.read(run.folder / "checkpoints" / "final").keys(), (run.folder / "config.yaml").read_text()
    with pytest.raises(UserError) as caught:
        change(run)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert console._mode == "text"
    after = checkpoint.read(run.folder / "checkpoints" / "final").keys(), (run.folder / "config.yaml").read_text()
    assert after == before


def test_a_new_run_from_a_config(tmp_path, capsys):
    config = Config(
        [Source("sql", "packaged/sql", limit=40)], model=ModelConfig(str(SMALL_BASE)), data=DataConfig(max_seq_length=256),
        training=TrainingConfig(max_steps=2),
    )  # fmt: skip
    run = dylora_mlx.learn(config, "mine", runs_folder=tmp_path, quiet=True)
    assert capsys.readouterr().out == ""
    assert list(run.experts) == ["sql"]
    assert run.folder == tmp_path / "mine"


def test_a_new_run_from_a_file(tmp_path, capsys):
    (tmp_path / "my.yaml").write_text(SMALL)
    options = {"training.max_steps": 1, "training.steps_per_eval": 1}
    with pytest.raises(UserError, match="exists already"):
        dylora_mlx.learn(tmp_path / "my.yaml", tmp_path.name, runs_folder=tmp_path.parent, options=options)
    assert re.search("BLAS|^$", capsys.readouterr().out)
