"""Loss spikes and routing that leaves experts without tokens: each reported once, and alike after resuming."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from dylora_mlx import train
from dylora_mlx.training import health
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint.state import AnomalyState
from dylora_mlx.training.skill import learn
from tests.conftest import start

STREAM = """
skills: [{name: sql, source: SQL}, {name: requests, source: REQUESTS}]
growth: {base_skill: null, policy: threshold, threshold: 1.0, dense_steps: 1, anneal_steps: 1}
data: {max_seq_length: 64}
training: {grad_accumulation_steps: 1, max_steps: 12, steps_per_eval: 4, memory_tokens: 128, save_every: 4, keep_checkpoints: 20}
log: {steps_per_report: 2}
"""


@pytest.fixture
def stream(short_skills) -> str:
    return STREAM.replace("SQL", str(short_skills / "sql")).replace("REQUESTS", str(short_skills / "requests"))


def spikes(losses: list[float]) -> list[int]:
    """Return the indices of a series at which a spike begins."""
    seen = AnomalyState()
    return [place for place, loss in enumerate(losses) if health.new_spike(seen, loss)]


# Losses.


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
def test_noise_and_a_falling_loss_are_no_spikes(noise):
    rng = np.random.default_rng(0)
    falling = 2.0 + 3.0 * np.exp(-np.arange(300) / 30)
    assert spikes((falling + rng.uniform(-noise, noise, 300)).tolist()) == []


def test_a_spike_is_reported_once_while_it_lasts_and_again_when_it_recurs():
    losses = [2.0 + 0.01 * (i % 5) for i in range(60)]
    losses[20:23] = [9.0, 8.0, 7.0]
    losses[40] = 2.6
    assert spikes(losses) == [20, 40]


def test_a_jump_needs_half_a_nat_and_six_deviations():
    still = [2.0] * 20
    assert spikes([*still, 2.49]) == []
    assert spikes([*still, 2.51]) == [20]
    restless = [2.0, 2.5, 3.0] * 7  # median 2.5, deviation 0.5: up to 5.5
    assert spikes([*restless, 5.4]) == []
    assert spikes([*restless, 5.6]) == [21]


def test_too_few_losses_report_no_spike():
    assert spikes([2.0] * (health.MIN_LOSSES - 1) + [9.0]) == []
    assert spikes([2.0] * health.MIN_LOSSES + [9.0]) == [health.MIN_LOSSES]


def test_a_new_level_becomes_usual():
    seen = AnomalyState()
    limits = [health.new_spike(seen, loss) for loss in [2.0] * 50 + [6.0] * 100]
    assert [place for place, each in enumerate(limits) if each] == [50]
    assert not seen.in_spike
    assert len(seen.losses) == health.WINDOW
    assert health.new_spike(seen, 9.0) is not None


# Routing. The shares of each domain are those of the base, expert 1 and expert 2.

OWNERS = {"a": 1, "b": 2}
FAIR = {"a": [0.1, 0.8, 0.1], "b": [0.1, 0.1, 0.8]}
STARVED = {"a": [0.1, 0.8, 0.1], "b": [0.2, 0.795, 0.005]}
ALL_TO_ONE = {"a": [0.0, 1.0, 0.0], "b": [0.0, 0.995, 0.005]}


def test_an_expert_without_tokens_is_named_after_three_evaluations_and_once():
    seen = AnomalyState()
    unserved = [health.routing_anomalies(seen, usage, OWNERS)[0] for usage in [STARVED] * 5 + [FAIR] + [STARVED] * 3]
    assert [place for place, each in enumerate(unserved) if each] == [2, 8]
    assert unserved[2] == [("b", 2, 0.005)]


def test_the_base_trainable_experts_and_future_skills_are_not_checked():
    assert health.unserved_domains(STARVED, {"a": 1}) == []
    assert health.unserved_domains({"python": [0.0, 1.0, 0.0]}, {"python": 0}) == []
    assert health.unserved_domains({"a": FAIR["a"]}, OWNERS) == []


def test_a_router_that_collapses_to_one_expert():
    assert health.collapsed_expert(FAIR, OWNERS) is None
    assert health.collapsed_expert(STARVED, OWNERS) is None
    assert health.collapsed_expert(ALL_TO_ONE, OWNERS) == 1
    assert health.collapsed_expert({name: [1.0, 0.0, 0.0] for name in "ab"}, OWNERS) == 0
    assert health.collapsed_expert(ALL_TO_ONE, {"a": 1}) is None, "one expert may well have everything"
    assert health.collapsed_expert(ALL_TO_ONE, {"a": 1, "b": 1}) is None
    seen = AnomalyState()
    anomalies = [health.routing_anomalies(seen, ALL_TO_ONE, OWNERS) for _ in range(5)]
    assert anomalies == [([], None), ([], None), ([], 1), ([], None), ([], None)]
    assert seen.unserved == {}, "only the collapse is counted"


# In a run.

KEYS = ("step", "loss_spike", "usual_loss", "spike_limit", "collapsed_router", "lm_loss", "eval_sql_loss")


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_warns_and_a_resumed_one_records_the_same(stream, tmp_path, monkeypatch, capsys):
    """The loss jumps at step 11, and every evaluation routes all tokens to expert 1."""
    train_step, warn_of_routing = learn.train_step, health.warn_of_routing

    def train_step_with_jump(run, *rest):
        outcome = train_step(run, *rest)
        jump = 5.0 if run.state.step == 10 else 0.0
        return outcome._replace(terms=outcome.terms._replace(lm_loss=outcome.terms.lm_loss + jump))

    def warn_as_if_collapsed(run, skill, expert_id, usage):
        one = [float(place == 1) for place in range(len(run.pool) + 1)]
        assert usage.keys() == run.domains.keys()
        warn_of_routing(run, skill, expert_id, dict.fromkeys(usage, one))

    monkeypatch.setattr(learn, "train_step", train_step_with_jump)
    monkeypatch.setattr(health, "warn_of_routing", warn_as_if_collapsed)
    assert train.main(start(tmp_path, stream)) == 0
    err = " ".join(capsys.readouterr().err.split())
    folder = tmp_path / "small"
    (jump,) = [r for r in records(folder) if "loss_spike" in r]
    assert (jump["step"], jump["skill"]) == (11, "sql")
    assert jump["loss_spike"] > jump["spike_limit"] >= jump["usual_loss"] + health.MIN_RISE
    assert "warning: step 11: the loss of sql jumps to" in err
    assert "lower training.learning_rate" in err
    (one,) = [r for r in records(folder) if "collapsed_router" in r]
    assert (one["skill"], one["collapsed_router"]) == ("requests", 1)
    assert "expert 1 gets every token of every domain" in err
    assert err.count("warning:") == 2

    first_lines = (folder / "metrics.jsonl").read_text().splitlines()
    wanted = checkpoint.read(folder / "checkpoints" / "final")["trainer.json"]
    shutil.rmtree(folder / "checkpoints" / "final")
    for step in checkpoint.step_folders(folder)[-3:]:
        shutil.rmtree(step)
    (left,) = checkpoint.step_folders(folder)[-1:]
    assert train.main(["--resume", str(folder)]) == 0
    assert int(left.name[5:]) < one["step"], "the warning came again"
    assert "expert 1 gets every token" in " ".join(capsys.readouterr().err.split())
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == len(first_lines)
    first_records = [{k: v for k, v in r.items() if k in KEYS} for r in map(json.loads, first_lines)]
    assert [{k: v for k, v in r.items() if k in KEYS} for r in records(folder)] == first_records
    assert checkpoint.read(folder / "checkpoints" / "final")["trainer.json"] == wanted


def test_a_starved_expert_is_named(capsys):
    logged = []
    experts = [SimpleNamespace(phase="frozen"), SimpleNamespace(phase="mature")]
    pool = type("Two", (), {"records": experts, "__len__": lambda self: 2})()
    run = SimpleNamespace(
        pool=pool, library=SimpleNamespace(experts_of={"a": 1}), state=SimpleNamespace(step=70, anomalies=AnomalyState()),
        metrics=SimpleNamespace(log=lambda step, record: logged.append((step, record))),
    )  # fmt: skip
    for _ in range(4):
        health.warn_of_routing(run, SimpleNamespace(name="b"), 2, STARVED)
    assert logged == [(70, {"skill": "b", "unserved_domain": "b", "expert": 2, "share": 0.005})]
    err = " ".join(capsys.readouterr().err.split())
    assert err.startswith(
        "warning: step 70: expert 2 holds b and gets 0.5% of it, for 3 evaluations now; raise training"
    )
    experts[1].phase = "dense"
    run.state.anomalies = AnomalyState()
    for _ in range(4):
        health.warn_of_routing(run, SimpleNamespace(name="b"), 2, STARVED)
    assert len(logged) == 1
