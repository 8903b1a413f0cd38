"""Samples of routed text: a domain's document with the expert and gate of each token."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.data import stream
from dylora_mlx.growth import phases
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.run import run_folder
from dylora_mlx.training import summary
from dylora_mlx.training.final_losses import FinalLosses
from dylora_mlx.training.step.domains import Domain, make_domains
from dylora_mlx.training.step.evaluate import evaluate
from tests.tiny import batch_of


@pytest.fixture(scope="module")
def opened(finished) -> Any:
    return run_folder.open_run(finished, "float32")


@pytest.fixture(scope="module")
def domain(opened) -> Domain:
    source = opened.config.skills[1]
    skill = stream.prepare_skill(source, opened.config.data, opened.base.tokenizer, opened.config.seed)
    return make_domains({"sql": skill.validation}, opened.config.data.max_seq_length, 1)["sql"]


def test_a_run_writes_a_sample_of_every_domain(finished):
    samples = json.loads((finished / "samples.json").read_text(encoding="utf-8"))
    assert list(samples["domains"]) == ["python", "requests", "sql", "requests_more"]
    assert samples["experts"] == ["base", "requests", "sql"]
    assert samples["step"] == 12
    for sample in samples["domains"].values():
        assert len(sample["tokens"]) == len(sample["expert_ids"]) == len(sample["gates"]) <= summary.MAX_TOKENS
        assert set(sample["expert_ids"]) <= {0, 1, 2}
        assert all(1 / 3 < gate <= 1 for gate in sample["gates"])


def test_samples_show_the_document_and_the_routers_experts(finished, opened, domain):
    ids = summary.pick_document(domain)
    sample = json.loads((finished / "samples.json").read_text(encoding="utf-8"))["domains"]["sql"]
    shown_ids = ids[1 : 1 + len(sample["tokens"])]
    assert "".join(sample["tokens"]) == opened.base.tokenizer.decode(shown_ids.tolist())
    gates = summary.document_gates(opened.model, opened.config.growth, ids[: len(shown_ids)])
    assert sample["expert_ids"] == gates.argmax(-1).tolist()
    assert np.allclose(sample["gates"], gates.max(-1), atol=1e-3)


def test_an_own_expert_that_is_no_good_is_named(capsys):
    """Its regret is below 0 although mixing helped nobody."""
    final = {
        "sql": FinalLosses(4.0, 3.5, 3.6, {}, None),
        "java": FinalLosses(4.0, 3.9, 4.1, {}, None),
        "text": FinalLosses(4.0, 4.1, 4.0, {}, None),
    }
    summary.print_losses("test loss", final, {"sql": 1, "java": 1})
    note = "worse with the own expert than with the base alone, so a regret below 0 is no merit there: java\n"
    assert capsys.readouterr().out.endswith(note)
    summary.print_losses("test loss", {"sql": final["sql"]}, {"sql": 1})
    assert "worse with" not in capsys.readouterr().out


def test_gates_equal_those_of_evaluation(opened, domain):
    schedule = phases.final_schedule(opened.config.growth)
    routing = Routing(schedule.top_k, mx.array(schedule.temperature))
    measured = evaluate(opened.model, domain, routing).usage
    rows = []
    for batch in domain.batches:
        for r, row in enumerate(batch.rows):
            for segment in range(1, len(row) + 1):
                rows.append(
                    summary.document_gates(
                        opened.model, opened.config.growth, batch.inputs[r, batch.segment_ids[r] == segment]
                    )
                )
    assert np.allclose(np.concatenate(rows).mean(0), measured, atol=1e-3)


@pytest.mark.parametrize(
    "text",
    ["plain words", "  indented\n\n\tcode()", "naïve café 北京 🙂🙃 e\u0301", "", "</span> & \"quotes\" 'n' \x07"],
)
def test_token_texts_join_to_the_text(base, text):
    ids = base.tokenizer.encode(text, add_special_tokens=False)
    texts = summary.token_texts(base.tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == base.tokenizer.decode(ids)


def test_a_character_of_several_tokens_comes_with_its_last():
    parts = {1: b"a", 2: "é".encode()[:1], 3: "é".encode()[1:], 4: b"b", 5: b"\xf0"}
    tokenizer = SimpleNamespace(decode=lambda ids: b"".join(parts[i] for i in ids).decode("utf-8", "replace"))
    assert summary.token_texts(tokenizer, [1, 2, 3, 4]) == ["a", "", "é", "b"]
    assert summary.token_texts(tokenizer, [1, 5]) == ["a", "\ufffd"], "cut within a character"
    assert summary.token_texts(tokenizer, []) == []


@pytest.mark.parametrize(("lengths", "chosen"), [([[5, 30], [40]], 1), ([[5], [6, 7]], 0), ([[300], [10, 24]], 2)])
def test_the_first_document_of_a_suitable_length_is_picked(lengths, chosen):
    batch = batch_of(lengths, 320)
    ids = summary.pick_document(Domain("a", [batch]))
    assert len(ids) - 1 == [n for row in lengths for n in row][chosen]
