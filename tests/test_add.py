"""dylora add: one more skill for a run that has finished."""

from __future__ import annotations

import json
import shutil

import pytest

from dylora_mlx import add, train


@pytest.fixture(scope="module")
def copy(finished, tmp_path_factory):
    made = tmp_path_factory.mktemp("add") / "small"
    shutil.copytree(finished, made)
    return made


def test_events_for_scripts(copy, capsys):
    arguments = [str(copy), "packaged/flask", "--name", "flask", "--limit", "40", "--rank", "2", "--json"]
    assert add.main(arguments) == 0
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["event"] for event in events].count("decision") == 1
    decision = next(event for event in events if event["event"] == "decision")
    assert (decision["skill"], decision["action"], decision["expert"]) == ("flask", "create", 3)
    assert events[-1]["event"] == "finished"
    assert events[-1]["skills"] == ["requests", "sql", "requests_more", "flask"]
    assert events[-1]["run"] == str(copy)
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run"),
        (["RUN"], "source"),
        (["RUN", "packaged/stripe"], "name"),
        (["RUN", "packaged/stripe", "--name", "sql"], "--name sql: this run has a skill or domain of that name"),
        (["RUN", "packaged/stripe", "--name", "x", "--preset", "nothing"], "preset"),
        (["RUN", "packaged/stripe", "--name", "x", "--rank", "0"], "rank: 0"),
        (["RUN", "packaged/nothing", "--name", "x"], "packaged/nothing"),
        (["nowhere", "packaged/stripe", "--name", "x"], "nowhere: no run here"),
        (["RUN", "packaged/stripe", "--name", "x", "--seed", "3"], "seed"),
        (["RUN", "packaged/stripe", "--name", "x", "--quiet", "--json"], "--quiet and --json"),
    ],
)
def test_mistakes(finished, capsys, arguments, message):
    before = sorted(path.name for path in finished.rglob("*"))
    assert add.main([str(finished) if word == "RUN" else word for word in arguments]) == 2
    _, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(path.name for path in finished.rglob("*")) == before


def test_a_run_that_has_not_finished(finished, tmp_path, capsys):
    copy = tmp_path / "small"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "checkpoints" / "final")
    assert add.main([str(copy), "packaged/stripe", "--name", "x"]) == 2
    assert f"go on with --resume {copy} first" in capsys.readouterr().err


def test_a_finished_run_says_how_to_teach_it_more(finished, capsys):
    assert train.main(["--resume", str(finished)]) == 2
    assert f"dylora add {finished} teaches it more" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as left:
        add.main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "dylora add runs/quickstart notes.jsonl --name notes" in shown
    assert "--preset" in shown
