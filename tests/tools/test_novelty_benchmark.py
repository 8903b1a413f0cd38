"""The novelty benchmark on synthetic labels: the composition of its streams, and verdicts against the true labels."""

from __future__ import annotations

from types import SimpleNamespace

import novelty_benchmark as tool
import numpy as np
import pytest
from novelty import judging, policies, streams
from novelty.labels import Label
from novelty.means import Bank
from novelty.policies import Verdict

from dylora_mlx.config import GrowthConfig
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace, Reference

DIMS, SHARD = 32, 40
COMMON = np.random.default_rng(99).normal(size=DIMS) * 20


def fake_encode(text: str, add_special_tokens: bool) -> list[int]:
    """Return random token ids: half depend on the label that the text begins with, half are shared by all texts."""
    label, number = text.split()[:2]
    rng = np.random.default_rng([sum(map(ord, label)), int(number), int(add_special_tokens)])
    first_id = 100 + (sum(map(ord, label)) * 37) % 900
    return [*rng.integers(first_id, first_id + 30, 20).tolist(), *rng.integers(0, 100, 20).tolist()]


class Encoder:
    """An encoder whose document means depend on the label that every text begins with."""

    base = SimpleNamespace(tokenizer=SimpleNamespace(encode=fake_encode))

    def means(self, texts: list[str]) -> np.ndarray:
        means = []
        for text in texts:
            label, number = text.split()[:2]
            direction = np.random.default_rng(sum(map(ord, label)) * 7919).normal(size=DIMS)
            noise = np.random.default_rng([sum(map(ord, label)), int(number)]).normal(size=DIMS)
            means.append(COMMON + direction + 0.6 * noise)
        return np.array(means, np.float32)


def labels(count: int = 24) -> list[Label]:
    names = [streams.FIRST, *(f"label{chr(97 + i)}" for i in range(count))]
    shards = [slice(SHARD * i, SHARD * (i + 1)) for i in range(4)]
    return [Label(name, [f"{name} {i}\n" for i in range(4 * SHARD)], shards) for name in names]


@pytest.fixture(scope="module")
def played() -> list[judging.Judged]:
    all_labels, growth = labels(), GrowthConfig(min_samples=10)
    bank = Bank(all_labels, Encoder())  # type: ignore[arg-type]
    space = EmbeddingSpace(Reference(COMMON, np.eye(DIMS)), growth.whitening)
    half = streams.Half("held out", all_labels)
    split = policies.splitter(growth)
    player = judging.Player(bank, space, policies.policies(growth, None), split, growth.moving_average)
    return tool.play(half, 6, 0, player)


def test_streams_have_the_intended_shares():
    first, second = streams.halves(labels(), 0)
    assert {label.name for label in first.labels} & {label.name for label in second.labels} == {streams.FIRST}
    for stream in streams.make(streams.Half("held out", labels()), 10, 0):
        kinds = [arrival.kind for arrival in stream.arrivals]
        assert streams.LENGTHS[0] - 2 <= len(kinds) <= streams.LENGTHS[1]
        known = sum(kind in ("shard", "duplicate") for kind in kinds)
        assert known / len(kinds) == pytest.approx(1 / 3, abs=0.12)
        seen = {streams.FIRST}
        for arrival in stream.arrivals:
            for part in arrival.parts:
                assert part.known == (part.label in seen)
            seen |= {part.label for part in arrival.parts}


def test_easy_cases_are_decided_correctly(played):
    assert judging.decisions(played, "threshold").value > 0.95
    assert judging.unsplit_decisions(played, "threshold").value > 0.9
    assert judging.split_at_all(played).value > 0.9
    assert judging.split_wrongly(played).value < 0.1
    parts = judging.mixed_parts(played, "threshold")
    assert parts.total == sum(len(j.part_verdicts) for j in played) > 0
    assert parts.value > 0.9


def test_the_earlier_rule_accepts_everything_as_known(played):
    """Without whitening, all means point in the base's common direction."""
    assert judging.missed_creations(played, "raw means, 0.75").value == 1.0
    assert judging.false_creations(played, "raw means, 0.75").value == 0.0


def test_verdicts_are_judged_by_the_true_labels(played):
    known = next(j for j in played if j.arrival.kind == "shard")
    new = next(j for j in played if j.arrival.kind == "new")
    cases = [
        known._replace(verdicts={"p": Verdict(novel, "x#0", 0.5)}, parts=1) for novel in (True, False)
    ] + [new._replace(verdicts={"p": Verdict(novel, "x#0", 0.5)}, parts=2) for novel in (True, False)]  # fmt: skip
    assert judging.decisions(cases, "p")[:2] == (2, 4)
    assert judging.unsplit_decisions(cases, "p")[:2] == (1, 4), "a file of one skill that was split is wrong"
    assert judging.false_creations(cases, "p")[:2] == (1, 2)
    assert judging.missed_creations(cases, "p")[:2] == (1, 2)


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (10, 10), (19, 20), (50, 100)])
def test_wilsons_interval(hits, count):
    """The ends p of the interval solve (hits / count - p)^2 = z^2 p (1 - p) / count."""
    for end in judging.wilson(hits, count):
        assert (hits / count - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / count, abs=1e-12)


def test_every_policy_has_a_verdict(played):
    names = {"threshold", "fixed", "adaptive", *(f"raw means, {t}" for t in policies.EARLIER)}
    assert all(j.verdicts.keys() == names for j in played if j.arrival.kind != "mixed")
    assert all(verdicts.keys() == names for j in played for _, verdicts in j.part_verdicts)


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--streams", "1"], "at least 2"), (["--seed", "-1"], "negative"), (["--json", "no/where/f.json"], "no folder")],
)
def test_bad_usage(capsys, argv, message):
    assert tool.main(argv) == 2
    assert message in capsys.readouterr().err


def test_missing_sources_are_refused(capsys):
    assert tool.main(["--sources", "nowhere.jsonl"]) == 2
    assert "no such file or folder" in capsys.readouterr().err
