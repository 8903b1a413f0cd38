"""Regression tests for fuzzing findings in files that a run writes, each with the smallest file that caused the fault.

Each file must now give a UserError, or its valid parts must be used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fuzzing import containers, of_adapters, of_growth, of_records, samples
from fuzzing.target import TARGETS

from dylora_mlx import explain
from dylora_mlx.errors import UserError
from dylora_mlx.exporting.model_card import _loss_table
from dylora_mlx.exporting.write import _results
from dylora_mlx.growth.decide import bandit_log, decision_log
from dylora_mlx.growth.library import Library, entry_file
from dylora_mlx.growth.novelty import embedding, projection
from dylora_mlx.growth.pool import ExpertRecord
from dylora_mlx.growth.rank.schedule import MAX_RANK
from dylora_mlx.model.routing.router import Router
from dylora_mlx.reporting import page, records
from dylora_mlx.system import files
from dylora_mlx.system.frozen_arrays import FrozenArrays
from dylora_mlx.system.run_format import FORMAT
from dylora_mlx.training.checkpoint import checkpoint
from tests.stress.test_fuzz_regressions import BEYOND, DEEP, DIGITS, wrote


@pytest.mark.parametrize(
    ("hashes", "message"),
    [([[1, "0"]], "missing or unreadable"), ({"adapter" + "9" * 300: "0"}, "missing from the checkpoint")],
)
def test_a_checkpoints_manifest(tmp_path, hashes, message):
    (tmp_path / "MANIFEST.json").write_text(json.dumps({"format": FORMAT, "sha256": hashes}))
    with pytest.raises(UserError, match=message):
        checkpoint.read(tmp_path)


def test_a_schedule_beyond_any_rank(tmp_path):
    seeds, run = of_growth.rank_schedule(tmp_path)
    content = json.loads(seeds[0])
    for changed in ({"max_rank": content["start"] << 200}, {"epsilon": BEYOND}):
        with pytest.raises(UserError, match="no rank schedule"):
            run(json.dumps(content | changed).encode())
    assert MAX_RANK >= 1 << 15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays, metadata: metadata.update(whitening="much"), "not readable as a projection head"),
        (lambda arrays, metadata: arrays.pop("expand.bias"), "holds no projection head"),
        (lambda arrays, metadata: arrays.update({"expand.bias": containers.fitted("BF16", [4], b"")}), "not float32"),
    ],
)
def test_a_projection_head(tmp_path, change, message):
    seeds, _ = of_growth.projection_head(tmp_path)
    arrays, metadata = containers.read_safetensors(seeds[0])
    change(arrays, metadata)
    path = wrote(tmp_path / "head.safetensors", containers.write_safetensors(arrays, metadata))
    with pytest.raises(UserError, match=message):
        projection.load_head(path, "f" * 64, 0.1, of_growth.DIMS)


@pytest.mark.parametrize("values", [[[np.inf, 0], [0, 1]], [[-1, 0], [0, 1]]], ids=["infinite", "below 0"])
def test_invalid_reference_statistics(tmp_path, values):
    arrays = {"mean": mx.zeros(2), "covariance": mx.array(values, mx.float32)}
    of_adapters.save(tmp_path / "r.safetensors", arrays)
    with pytest.raises(UserError, match="not readable as reference statistics"):
        embedding.load_reference(tmp_path / "r.safetensors", 2)


def test_a_history_for_the_bandit(tmp_path):
    record = bandit_log.to_json(bandit_log.BanditTrial(of_growth.CONTEXT, "create", 0.5, {"create": 0.1}))
    for number in (BEYOND, -1):
        record["context"]["tokens"] = number
        with pytest.raises(UserError, match="line 1: the bandit's record is damaged"):
            bandit_log.read_history([wrote(tmp_path / "h.jsonl", json.dumps({"bandit": record}) + "\n")])
    with pytest.raises(UserError, match="line 1: not JSON"):
        bandit_log.read_history([wrote(tmp_path / "h.jsonl", DEEP + "\n")])


@pytest.mark.parametrize(
    "line", ['{"skill": [], "action": "create", "expert": 1}', '{"skill": "a", "action": "b", "expert": null}', DEEP]
)
def test_a_damaged_line_of_a_decision_log(tmp_path, line):
    wrote(tmp_path / decision_log.FILE_NAME, line + "\n")
    with pytest.raises(UserError, match="line 1: not a decision"):
        decision_log.read_decisions(tmp_path)


def test_a_decision_log_that_is_not_text(tmp_path):
    wrote(tmp_path / decision_log.FILE_NAME, b"\xff\n")
    with pytest.raises(UserError, match="cannot be read"):
        decision_log.DecisionLog(tmp_path)


def of_run(folder: Path, **changed: Any) -> Path:
    """Write the records of a run folder, some of them replaced: name_of_file=content."""
    for name, content in of_records.FILES.items():
        wrote(folder / name, changed.get(name.replace(".", "_"), content))
    return folder


@pytest.mark.parametrize(
    "changed",
    [
        {"metrics_jsonl": json.dumps({"step": BEYOND}) + "\n"}, {"config_yaml": DEEP}, {"config_yaml": "a: &a [*a]"},
        {"config_yaml": "a: !!timestamp x"}, {"config_yaml": f"a: {DIGITS}"},
        {"decisions_jsonl": json.dumps({**of_records.DECISIONS[1], "details": {"into": 2**40}}) + "\n"},
        {"decisions_jsonl": json.dumps({**of_records.DECISIONS[1], "expert_ids": {"0": 2**40}}) + "\n"},
    ],
    ids=range(7),
)  # fmt: skip
def test_a_report_is_drawn_of_what_there_is(tmp_path, changed):
    assert page.run_page(of_run(tmp_path, **changed)).endswith("</html>\n")


def test_numbers_beyond_floats_are_none():
    assert [records.finite_number(value) for value in (BEYOND, -BEYOND, True, float("nan"), 3)] == [None] * 4 + [3.0]


@pytest.mark.parametrize(
    "change", [{"outcome": "x"}, {"score": [1]}, {"action": "dance"}, {"interval": None}, {"skill": "\ud800"}]
)
def test_explain_names_the_file_that_is_damaged(tmp_path, change, monkeypatch, capsys):
    decision = {**of_records.DECISIONS[0], **change}
    of_run(tmp_path, decisions_jsonl=json.dumps(decision) + "\n")
    monkeypatch.setattr(explain, "console", explain.Console(soft_wrap=True))
    messages = []
    for skill in ([], [decision["skill"]]):
        try:
            explain.command([str(tmp_path), *skill])
        except UserError as error:
            messages.append(str(error))
    assert any("decisions.jsonl: not as a run writes it" in message for message in messages)


@pytest.mark.parametrize("test", [[], {"sql": 3}, {"sql": {"base": "low"}}, {"sql": {"base": BEYOND, "mixture": None}}])
def test_a_card_leaves_out_what_is_no_loss(tmp_path, test):
    seeds, run = TARGETS["card"].make(tmp_path)
    run(json.dumps(json.loads(seeds[0]) | {"test": test}).encode())
    assert "test" in (_results(tmp_path) or {})
    assert _loss_table({"test": test}).count("\n") == 4 + len(test)


@pytest.mark.parametrize(
    "change",
    [
        lambda index, part: index["entries"][0].pop("arrivals"), lambda index, part: part("statistics").pop("means"),
        lambda index, part: part("statistics").update(total=np.zeros(3, np.float32)), lambda index, part: index.update(entries=3),
        lambda index, part: part("drift").update(drift=np.full(8, np.nan, np.float32)),
        lambda index, part: index["entries"][1].update(expert="1"),
        lambda index, part: part("memory").update(memory=np.zeros((0, 8), np.float32)),
        lambda index, part: part("statistics").update(count=np.zeros(1)),
        lambda index, part: part("exemplars").update({f"exemplar_{n}": np.full(3, 9) for n in ("lengths", "tokens", "learn")}),
    ],
    ids=range(9),
)  # fmt: skip
def test_damaged_parts_of_a_library(change):
    library = samples.library()
    index, files = json.loads(json.dumps(library.describe())), library.files()
    assert len(Library.restore(index, files)) == 2
    change(index, lambda part: files.setdefault(entry_file(0, part), FrozenArrays({})))
    with pytest.raises(UserError, match="library of this checkpoint is damaged"):
        Library.restore(index, files)


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 0},
        {"rank": 2**40},
        {"alpha": BEYOND},
        {"phase": "old"},
        {"frozen_projections": [[]]},
        {"x": 1},
        {"frozen": 1},
    ],
)
def test_a_damaged_record_of_an_expert(change):
    with pytest.raises(UserError, match="record of an expert is damaged"):
        ExpertRecord.from_json(samples.pool().describe()[0] | change)


def test_missing_or_misshaped_rows_of_a_router():
    router = Router(4)
    for arrays in ({}, {"rows.0.weight": mx.zeros(4)}, {"rows.0.weight": mx.zeros(5), "rows.0.bias": mx.zeros(1)}):
        with pytest.raises(UserError, match="the router's 'rows"):
            router.load_arrays(arrays)


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        f"a: {DIGITS}",
        "skills: ? " + "? " * 50_000,
        'a: "' + "\\x5b" * 100_000 + '"',
        '{"a":' * 900 + "1" + "}" * 900,  # PyYAML reads this one, but no recursive code can walk it
    ],
    ids=range(5),
)
def test_yaml_that_ends_the_process_of_a_parser_in_c(text):
    with pytest.raises(ValueError, match=r"nested too deeply|a value that is none"):
        files.parse_yaml(text)


def test_aliases_that_blow_up():
    text = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
    with pytest.raises(ValueError, match="more than 100000 values"):
        files.parse_yaml(text)
