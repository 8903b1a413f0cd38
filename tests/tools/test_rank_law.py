"""tools/benchmarks/rank_law.py: measurements on a tiny base, printed and written results, and refused input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).parents[2] / "tools/benchmarks"

import rank_law as tool  # noqa: E402

from dylora_mlx.cli.parser import run_command  # noqa: E402
from dylora_mlx.config import Config, DataConfig, ModelConfig, Source, TrainingConfig  # noqa: E402
from dylora_mlx.data.stream import Skill, Split  # noqa: E402
from dylora_mlx.growth.rank.schedule import load_schedule  # noqa: E402
from dylora_mlx.training.step.domains import make_domains  # noqa: E402
from tests.tiny import pieces_of, tiny_base  # noqa: E402

SMALL_LIMIT = ["--limit", "20"]


@pytest.fixture
def plan() -> tool.Plan:
    """Return a plan with ten random documents of a tiny base; validation uses the training documents."""
    source = Source(name="skill", source="nowhere")
    config = Config(
        skills=[source],
        data=DataConfig(max_seq_length=24),
        model=ModelConfig(router_layer=0),
        training=TrainingConfig(learning_rate=0.05),
    )
    split = Split(pieces_of([20, 9, 13, 6, 24, 8, 5, 3, 11, 17]), 10)
    (domain,) = make_domains({"validation": split}, 24, 1).values()
    return tool.Plan(tiny_base(), config, Skill("skill", source, split, split, split, ""), domain, 8, 2.0)


@pytest.fixture
def synthetic(monkeypatch) -> list[tuple[int, int, int]]:
    """Replace training by losses of a known law; return the list of (rank, seed, steps) calls."""
    calls = []

    def loss_of(plan, rank, seed, steps):
        calls.append((rank, seed, steps))
        return 3.0 + 0.5 * rank**-0.8 + 0.002 * np.random.default_rng([rank, seed]).normal() if steps else 4.25

    monkeypatch.setattr(tool, "loss_of", loss_of)
    return calls


def test_an_expert_trains_alone(plan):
    before, after = (tool.loss_of(plan, 4, 0, steps) for steps in (0, 4))
    assert after < before - 0.05
    assert tool.loss_of(plan, 4, 0, 4) == after, "rank, seed and steps decide it"
    assert tool.loss_of(plan, 4, 1, 4) != after
    assert tool.loss_of(plan, 2, 0, 0) == before, "a new expert is the base"


def test_the_scale_stays_as_the_rank_grows(plan, monkeypatch):
    created, expert = [], tool.Expert
    monkeypatch.setattr(tool, "Expert", lambda *arguments: created.append(expert(*arguments)) or created[-1])
    for rank in (1, 4, 8):
        tool.loss_of(plan, rank, 0, 0)
    assert [(e.rank, e.scale) for e in created] == [(1, 2.0), (4, 2.0), (8, 2.0)]


def test_a_sweep(plan, capsys):
    losses = tool.sweep(plan._replace(steps=2), [1, 3], [0, 5])
    assert losses.tolist() == [[tool.loss_of(plan, rank, seed, 2) for seed in (0, 5)] for rank in (1, 3)]
    assert capsys.readouterr().out.count("rank") == 4


def test_printed_and_written_results(synthetic, tmp_path, capsys):
    out = tmp_path / "ranks.json"
    assert tool.command([*SMALL_LIMIT, "--ranks", "4", "1", "2", "8", "--steps", "7", "--out", str(out)]) == 0
    assert synthetic == [(1, 0, 0), *((rank, seed, 7) for rank in (1, 2, 4, 8) for seed in (0, 1, 2))]
    schedule = load_schedule(out)
    assert (schedule.epsilon, schedule.scale, schedule.max_rank) == (0.01, 2.0, 8)
    assert schedule.law["c"].interval is not None
    assert schedule.law["c"].interval[0] < 0.8 < schedule.law["c"].interval[1]
    measured = json.loads(out.read_text())["measured"]
    assert measured["ranks"] == [1, 2, 4, 8]
    assert np.shape(measured["losses"]) == (4, 3)
    assert measured["losses"][1][2] == tool.loss_of(None, 2, 2, 7)
    assert (measured["skill"], measured["steps"], measured["limit"]) == ("packaged/sql", 7, 20)
    assert measured["base_loss"] == 4.25
    printed = capsys.readouterr().out
    assert "the base alone: 4.2500" in printed
    assert f"{np.mean(measured['losses'][0]):.4f}" in printed
    assert schedule.verdict in printed
    assert f"start at rank {schedule.start}, double to rank 8 at most" in printed


@pytest.mark.parametrize("seeds", [["0"], ["0", "1"]], ids=["one seed", "two seeds"])
def test_a_plot(synthetic, tmp_path, seeds):
    pytest.importorskip("plotly")
    out, plot = tmp_path / "ranks.json", tmp_path / "ranks.html"
    arguments = [*SMALL_LIMIT, "--ranks", "1", "2", "8", "--out", str(out), "--plot", str(plot)]
    assert tool.command([*arguments, "--seeds", *seeds]) == 0
    page = plot.read_text(encoding="utf-8")
    assert ("95% interval" in page) == (len(seeds) > 1), "one seed and three ranks have no band"
    assert "measured" in page
    assert "max_rank" in page


def test_a_loss_that_is_not_finite_is_a_failure(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tool, "loss_of", lambda plan, rank, seed, steps: float("nan"))
    assert tool.command([*SMALL_LIMIT, "--out", str(tmp_path / "ranks.json")]) == 1
    assert capsys.readouterr().err == ("error: rank 1, seed 0: the loss is not finite; try a lower --learning-rate\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "1", "2"], "--ranks: at least three"),
        (["--ranks", "1", "2", "2"], "none may come twice"),
        (["--seeds", "1", "1"], "--seeds: none may come twice"),
        (["--seeds", "-1"], "--seeds: none may come twice or be below 0"),
        (["--out", "nowhere/ranks.json"], "nowhere/ranks.json: cannot be written"),
        (["--plot", "."], "a folder; name a file"),
        (["--skill", " "], "names no source"),
        (["--learning-rate", "2"], "learning_rate: 2.0 is not between 0 and 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_refused_in_one_line_before_any_work(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tool, "load_base", lambda *options: pytest.fail("the base was loaded before the mistake"))
    assert run_command(tool.command, ["--out", "ranks.json", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--skill", "missing.jsonl"], ["--base", "./nowhere"]], ids=" ".join)
def test_missing_sources_are_refused(tmp_path, capsys, arguments):
    assert run_command(tool.command, ["--out", str(tmp_path / "ranks.json"), *arguments]) == 2
    error = capsys.readouterr().err
    assert arguments[1] in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [[], ["--out", "x", "--ranks", "0", "1", "2"], ["--out", "x", "--steps", "1.5"], ["--out", "x", "--epsilon", "0"],
     ["--out", "x", "--scale", "nan"], ["--out", "x", "--seeds", "a"], ["--out", "x", "--what"]],
    ids=" ".join,
)  # fmt: skip
def test_bad_usage(capsys, arguments):
    assert tool.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.command(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "python tools/benchmarks/rank_law.py --out ranks.json" in printed
    assert all(name in printed for name in ("--skill", "--ranks", "--seeds", "--epsilon", "growth.rank.schedule"))


@pytest.mark.slow
def test_a_small_sweep(tmp_path):
    out = tmp_path / "ranks.json"
    assert (
        tool.command([*SMALL_LIMIT, "--ranks", "1", "4", "16", "--seeds", "0", "1", "--steps", "4", "--out", str(out)])
        == 0
    )
    schedule = load_schedule(out)
    assert schedule.max_rank == 16
    assert schedule.gains[1].value > 0
