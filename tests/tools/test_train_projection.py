"""tools/benchmarks/train_projection.py: how sources form skills, its separation measure, and one small run."""

from __future__ import annotations

import json
import re

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import numpy as np
import pytest
import train_projection

from dylora_mlx.cli.parser import run_command
from dylora_mlx.errors import UserError
from dylora_mlx.growth.novelty import projection
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace, Reference
from dylora_mlx.model.base.load import load_base

DIMS = 8
PLAIN = EmbeddingSpace(Reference(np.zeros(DIMS), np.eye(DIMS)), 0.0)


def skill(number: int, noise: float, n: int = 40) -> np.ndarray:
    """Return document means around a direction that only this skill has."""
    return 3 * np.eye(DIMS)[number] + noise * np.random.default_rng(number).normal(size=(n, DIMS))


def test_sources_of_one_name_are_one_skill():
    grouped = train_projection.sources(["mine/notes.jsonl", "api=a/b", "packaged/sql", "api=c=d"], 50)
    assert {name: [s.source for s in parts] for name, parts in grouped.items()} == {
        "notes": ["mine/notes.jsonl"], "api": ["a/b", "c=d"], "sql": ["packaged/sql"],
    }  # fmt: skip
    assert all(s.limit == 50 for parts in grouped.values() for s in parts)
    default = train_projection.sources(train_projection.DEFAULT, 50)
    assert [s.source for s in default["requests"]] == ["packaged/requests", "packaged/requests_more"]


@pytest.mark.parametrize("text", ["=a/b", "two words=a", "name="])
def test_a_source_needs_a_name(text):
    with pytest.raises(UserError, match=r"write NAME=SOURCE"):
        train_projection.sources([text], 50)


def test_separation_of_distant_skills():
    tested = [skill(number, 0.5) for number in range(2)]
    auc, same, different = train_projection.separation(PLAIN, tested, [skill(2, 0.5)], 20, 0)
    assert auc == 1
    assert same > 0.95
    assert abs(different) < 0.2


def test_separation_of_indistinguishable_skills():
    alike = [np.random.default_rng(seed).normal(size=(60, DIMS)) for seed in range(6)]
    assert 0.4 < train_projection.separation(PLAIN, alike, [], 4, 0).auc < 0.6
    one = np.ones((40, DIMS))
    assert train_projection.separation(PLAIN, [one, one], [], 4, 0).auc == 0.5, "ties count half"


def test_smaller_batches_and_similar_skills_are_harder():
    tested = [skill(number, 4.0) for number in range(4)]
    small, large = (train_projection.separation(PLAIN, tested, [], batch, 0).auc for batch in (2, 20))
    assert small < large
    against = [skill(0, 4.0) + 0.01]
    assert train_projection.separation(PLAIN, tested, against, 20, 0).auc < large, "a skill that hardly differs"


def test_a_division_does_not_share_documents():
    means = {name: np.arange(40.0)[:, None] + 100 * i for i, name in enumerate("abc")}
    parts = train_projection.divide(means, ["b"], 0)
    assert [len(group) for group in (*parts.trained, *parts.tested, *parts.new)] == [30, 30, 10, 10, 40]
    for trained, tested, all_means in zip(parts.trained, parts.tested, (means["a"], means["c"]), strict=True):
        assert sorted(np.concatenate([trained, tested])[:, 0]) == list(all_means[:, 0])
    assert np.array_equal(parts.new[0], means["b"])


NAMES = ("requests", "sql", "flask", "stripe")


def test_a_run(tmp_path, capsys):
    out = tmp_path / "new" / "head.safetensors"
    arguments = [f"packaged/{name}" for name in NAMES] + ["--limit", "32", "--steps", "8", "--out", str(out)]
    assert train_projection.command([*arguments, "--holdout", "stripe"]) == 0
    printed = capsys.readouterr().out
    assert "documents: requests 32, sql 32, flask 32, stripe 32" in printed
    assert "trained on 3 skills" in printed
    assert printed.count("AUC") == 8
    assert printed.index("skills trained on") < printed.index("skills held out")
    assert all(0 <= float(auc) <= 1 for auc in re.findall(r"AUC (\S+)", printed))
    base = load_base("embedded", "float32")
    head = projection.load_head(out, base.fingerprint, 0.1, base.args.hidden_size)
    x = np.eye(base.args.hidden_size)[:3]
    assert np.allclose(np.linalg.norm(head(x), axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--holdout", "nothing"], "--holdout nothing: no such skill; there are flask"),
        (["missing.jsonl"], "missing.jsonl"),
        (["packaged/sql", "packaged/flask", "--limit", "32"], "at least three skills"),
        (["--base", "missing/folder/here"], "no such folder"),
    ],
)
def test_mistakes_are_refused_in_one_line(arguments, message, capsys):
    assert run_command(train_projection.command, arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_a_small_skill_is_refused(tmp_path, capsys):
    source = tmp_path / "small.jsonl"
    source.write_text(
        "".join(json.dumps({"text": f"SELECT {i} FROM things WHERE thing = {i};"}) + "\n" for i in range(20))
    )
    others = ["packaged/sql", "packaged/flask", "packaged/stripe"]
    assert run_command(train_projection.command, [str(source), *others]) == 2
    assert re.search(r"skill 'small': \d+ documents, at least 32 are needed", capsys.readouterr().err)


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    base = load_base("embedded", "float32")
    with pytest.raises(UserError, match=r"file/head: cannot be written"):
        train_projection.write(
            projection.ProjectionHead(4, 2, np.random.default_rng(0)), tmp_path / "file" / "head", base, 0.1
        )


@pytest.mark.parametrize(
    "arguments", [["--limit", "5"], ["--steps", "0"], ["--whitening", "nan"], ["--dtype", "int4"]], ids=" ".join
)
def test_bad_usage_is_refused_in_one_line(arguments, capsys):
    assert train_projection.main(arguments) == 2
    err = capsys.readouterr().err
    assert arguments[0] in err
    assert err.count("\n") == 1
