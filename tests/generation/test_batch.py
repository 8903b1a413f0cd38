"""Many texts at once: the same as each alone, for every way to route."""

from __future__ import annotations

import json
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx import generate
from dylora_mlx.errors import UserError
from dylora_mlx.generation import decode, stream
from dylora_mlx.generation.batch import BatchPrompt, generate_texts
from dylora_mlx.generation.decode import TokenRouted
from dylora_mlx.generation.session import GenerationSettings, Session
from dylora_mlx.generation.stream import GenerationSummary, Sampling, TextPiece
from dylora_mlx.model.routing.document_mean import DocumentMean
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.run import run_folder

TOP2 = Routing(2, mx.array(1.0))
LENGTHS = (5, 140, 1, 60, 130, 20)
"""The embedded base's window is 128."""


def prompts(base) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(4, base.args.vocab_size, length).astype(np.int32) for length in LENGTHS]


def alone(model, base, ids: np.ndarray, count: int, stops=()) -> tuple[str, list[int], GenerationSummary]:
    *pieces, summary = stream.stream_text(model, base.tokenizer.stopping_at(()), ids, count, Sampling(), stops)
    assert all(isinstance(piece, TextPiece) for piece in pieces)
    return "".join(piece.text for piece in pieces), [piece.expert_id for piece in pieces], summary


@pytest.mark.parametrize("kind", ["routed", "fused", "base"])
def test_texts_are_those_of_each_alone(base, make_pool, kind):
    """With one row, and with four."""
    pool = make_pool([4, 3, 2])
    pool.model.document_mean = DocumentMean(0.5, 0.9)
    gates = np.array([0, 0, 1, 0] if kind == "fused" else [1, 0, 0, 0], np.float32)
    counts = [20, 9, 12, 20, 16, 3]
    with decode.fused_experts(base, pool.model, gates) as fused:
        model = TokenRouted(pool.model, TOP2) if kind == "routed" else fused
        expected = [alone(model, base, ids, count) for ids, count in zip(prompts(base), counts, strict=True)]
        stop = expected[0][0][6:9]
        stopped = alone(model, base, prompts(base)[0], 20, [stop])
        batch = [BatchPrompt(ids, count) for ids, count in zip(prompts(base), counts, strict=True)]
        batch += [batch[0]._replace(stops=[stop]), batch[0]._replace(max_tokens=0)]
        tokenizer = base.tokenizer.stopping_at(())
        for rows in (1, 4):
            done: list[int] = []
            texts = generate_texts(model, tokenizer, batch, Sampling(), partial(done.append, 1), rows)
            check_texts(kind, batch, texts, done, expected, stopped)


def check_texts(kind: str, batch, texts, done: list[int], expected, stopped) -> None:
    assert [text.text for text in texts] == [*(text for text, _, _ in expected), stopped[0], ""]
    reasons = [(text.summary.tokens, text.summary.reason) for text in texts]
    assert reasons[:-2] == [(summary.tokens, summary.reason) for _, _, summary in expected]
    assert texts[-2].summary.reason == "stop"
    assert len(done) == len(batch) - 1, "nothing is generated for the last one"
    if kind == "routed":
        for text, (_, expert_ids, _) in zip(texts, expected, strict=False):
            assert len(text.expert_ids) == text.summary.tokens
            if len(expert_ids) == text.summary.tokens:  # each token is a piece of its own
                assert text.expert_ids == expert_ids
        assert len({expert_id for text in texts for expert_id in text.expert_ids}) > 1
    else:
        assert not any(text.expert_ids for text in texts)


def test_fixed_gates_differ_from_row_to_row(base, make_pool):
    pool = make_pool([4, 3])
    model, ids = TokenRouted(pool.model, TOP2), prompts(base)[0]
    columns = np.eye(3, dtype=np.float32)
    batch = [BatchPrompt(ids, 10, fixed_gates=gates) for gates in columns]
    found = generate_texts(model, base.tokenizer.stopping_at(()), batch, Sampling())
    for text, gates in zip(found, columns, strict=True):
        with decode.fused_experts(base, pool.model, gates) as fused:
            assert text.text == alone(fused, base, ids, 10)[0]
        assert text.expert_ids == []


def test_sampling_follows_the_seed(base, make_pool):
    pool = make_pool([4])
    batch = [BatchPrompt(ids, 8) for ids in prompts(base)[:3]]
    hot = Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.2)

    def texts(seed: int) -> list[str]:
        mx.random.seed(seed)
        model = TokenRouted(pool.model, TOP2)
        return [text.text for text in generate_texts(model, base.tokenizer.stopping_at(()), batch, hot)]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)


ASKED = ["SELECT name", "import requests\n\ndef fetch(", "SELECT name FROM fruits WHERE"]


@pytest.mark.parametrize("options", [[], ["--routing", "prompt"], ["--expert", "sql"], ["--stop", "e"]], ids=len)
def test_a_file_of_prompts(finished, tmp_path, capsys, options):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps({"id": number, "prompt": text}) + "\n" for number, text in enumerate(ASKED)))
    common = [str(finished), "-m", "9", *options]
    assert generate.main([*common, "--prompts", str(file), "--out", str(out)]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert generate.main([*common, "--prompts", str(file)]) == 0
    assert capsys.readouterr().out == out.read_text()
    for number, (text, line) in enumerate(zip(ASKED, found, strict=True)):
        assert generate.main([*common, "-p", text, "--json"]) == 0
        single = json.loads(capsys.readouterr().out)
        assert line == {"id": number, "prompt": text, "text": single["text"], "experts": line["experts"],
                        "tokens": single["tokens"], "reason": single["reason"]}  # fmt: skip
        assert sum(line["experts"].values()) == (0 if options[:1] in (["--routing"], ["--expert"]) else line["tokens"])


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ('{"prompt": "x"}\n{"text": "y"}\n', [], "prompts.jsonl, line 2: no text in the column 'prompt'"),
        ('{"prompt": 5}\n', [], "line 1: no text in the column 'prompt'"),
        ('{"prompt": "x"}\n' + json.dumps({"prompt": "x " * 3000}), [], "line 2: the prompt has 3002 tokens"),
        ("", [], "the file has no records"),
        ('{"prompt": "x"}\n', ["-p", "x"], "--prompts takes no --prompt"),
        ('{"prompt": "x"}\n', ["--out", "no/such/folder.jsonl"], "cannot be written"),
    ],
)
def test_mistakes_in_a_file_of_prompts(finished, tmp_path, capsys, content, arguments, message):
    (tmp_path / "prompts.jsonl").write_text(content)
    assert generate.main([str(finished), "--prompts", str(tmp_path / "prompts.jsonl"), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_out_needs_prompts(finished, capsys):
    assert generate.main([str(finished), "-p", "x", "--out", "x.jsonl"]) == 2
    assert "--out is for --prompts" in capsys.readouterr().err


def test_a_prompt_that_is_too_long_is_named(finished):
    session = Session(run_folder.open_run(finished, load_experts=False), GenerationSettings(4))
    with pytest.raises(UserError, match="prompt 2: the prompt has 3002 tokens"):
        session.answer_all(["x", "x " * 3000])
