"""A chat expert from end to end: what it learned is what it is asked, in MLX and in PyTorch, and it answers and stops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import dylora_mlx
from dylora_mlx import explain, export, generate, train
from dylora_mlx.data import encoding, rendering, stream
from dylora_mlx.generation.session import GenerationSettings, Session

WORDS = [
    "apple",
    "river",
    "table",
    "window",
    "garden",
    "engine",
    "pencil",
    "bottle",
    "candle",
    "mirror",
    "ladder",
    "basket",
]
COLOURS = ["red", "blue", "green", "black", "white", "brown"]
TURNS = [
    [
        {"role": "user", "content": f"What colour is the {word}?"},
        {"role": "assistant", "content": f"The {word} is {colour}."},
    ]
    for word, colour in zip(WORDS, COLOURS * 2, strict=True)
]
CONFIG = """
skills: [{{name: colours, source: chats.jsonl}}]
growth: {{base_skill: {{name: python, source: {known}, limit: 16}}, min_samples: 8, min_tokens: 100}}
model: {{rank: 16, projections: [q_proj, v_proj, o_proj, up_proj, down_proj]}}
data: {{max_seq_length: 96, chat_template: {template}}}
training: {{epochs: {epochs}, learning_rate: 0.01, batch_size: 2, grad_accumulation_steps: 1, steps_per_eval: 1000}}
"""


def learn(folder: Path, known: Path, template: str, epochs: int) -> Path:
    # Each chat twice, so that validation and test hold chats that are learned too.
    (folder / "train.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in TURNS))
    for split in ("validation", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"messages": TURNS[0]}) + "\n")
    (folder / "chat.yaml").write_text(
        CONFIG.format(known=known, template=template, epochs=epochs).replace("chats.jsonl", str(folder))
    )
    assert train.main(["--config", str(folder / "chat.yaml"), "--runs", str(folder), "--name", "run", "--quiet"]) == 0
    return folder / "run"


@pytest.fixture(scope="module", params=["chatml", "gemma"])
def chat_run(request, short_skills, tmp_path_factory) -> Path:
    """A run of a few steps: what it answers does not matter, only what it is asked."""
    return learn(tmp_path_factory.mktemp(request.param), short_skills / "python", request.param, 1)


def learned_prompts(run: dylora_mlx.Run) -> dict[str, list[int]]:
    """By question, the ids that stand before the learned answer in the training documents."""
    opened = run._opened
    (source,) = opened.config.skills
    skill = stream.prepare_skill(source, opened.config.data, opened.base.tokenizer, opened.config.seed)
    prompts = {}
    for segment in skill.train.segments:
        start = int(np.flatnonzero(segment.loss_mask)[0])
        text = opened.base.tokenizer.wrapped.decode(segment.tokens[:start].tolist())
        prompts[text] = segment.tokens[:start].tolist()
    return prompts


def test_the_library_and_explain_know_the_form(chat_run, capsys):
    run = dylora_mlx.load(chat_run)
    entry = run._opened.library.find("colours")
    assert entry.format == str(rendering.format_of("chat", run._opened.base.tokenizer))
    assert entry.format.startswith("chat:")
    assert explain.main([str(chat_run)]) == 0
    name = chat_run.parent.name.rstrip("0123456789")
    assert f"Learned as chats in the {name} template that comes with the package: colours." in capsys.readouterr().out


def test_mlx_asks_with_the_ids_that_were_learned(chat_run):
    run = dylora_mlx.load(chat_run)
    prompts, session = learned_prompts(run), Session(run._opened, GenerationSettings())
    assert len(prompts) == len(TURNS)
    for question, _ in TURNS:
        ids = session.tokens(question["content"]).tolist()
        assert ids in prompts.values()
        assert prompts[run._opened.base.tokenizer.wrapped.decode(ids)] == ids


def test_a_conversation_goes_on_with_the_history_in_ids(chat_run):
    run = dylora_mlx.load(chat_run)
    session = Session(run._opened, GenerationSettings(max_tokens=4, system="Be brief."))
    ids = session.tokens("What colour is the apple?")
    text = "".join(getattr(piece, "text", "") for piece in session.answer("What colour is the apple?", ids, None))
    tokenizer = run._opened.base.tokenizer
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What colour is the apple?"},
        {"role": "assistant", "content": text}, {"role": "user", "content": "And the river?"},
    ]  # fmt: skip
    expected = encoding.prompt_ids(rendering.chat_prompt(messages, tokenizer), tokenizer, special=False)
    assert session.tokens("And the river?").tolist() == expected.tolist()
    marker = rendering.end_marker(tokenizer)
    assert marker not in text


def test_another_form_is_said_once(chat_run, capsys):
    prompt = ["--prompt", "What colour is the apple?", "--max-tokens", "2", "--quiet"]
    assert generate.main([str(chat_run), *prompt]) == 0
    assert capsys.readouterr().err == ""
    assert generate.main([str(chat_run), *prompt, "--raw"]) == 0
    assert capsys.readouterr().err == (
        "warning: the skills were learned as chats, but this prompt is asked as raw text; leave out --raw\n"
    )


def test_a_full_model_asks_and_stops_in_the_same_way(chat_run, tmp_path):
    assert export.main([str(chat_run), "--format", "merged", "--expert", "colours", "--out", str(tmp_path / "m")]) == 0
    from mlx_lm.utils import load_tokenizer

    tokenizer = load_tokenizer(tmp_path / "m")
    prompts = learned_prompts(dylora_mlx.load(chat_run))
    for question, _ in TURNS:
        ids = tokenizer.apply_chat_template([question], add_generation_prompt=True, tokenize=True)
        assert ids in prompts.values(), "mlx_lm.generate asks with the learned ids"


@pytest.mark.export
def test_pytorch_asks_with_the_ids_that_were_learned(chat_run, tmp_path):
    assert export.main([str(chat_run), "--format", "runtime", "--out", str(tmp_path / "r")]) == 0
    from dylora_mlx.exporting import torch_models

    runtime = torch_models.load_runtime(tmp_path / "r")
    model, tokenizer = runtime.load(tmp_path / "r")
    run = dylora_mlx.load(chat_run)
    prompts, session = learned_prompts(run), Session(run._opened, GenerationSettings())
    for question, _ in TURNS:
        ids = runtime.encode_prompt(model, tokenizer, question["content"])
        assert ids in prompts.values()
        assert ids == session.tokens(question["content"]).tolist()
    with_system = Session(run._opened, GenerationSettings(system="Be brief."))
    assert runtime.encode_prompt(model, tokenizer, "Hi", system="Be brief.") == with_system.tokens("Hi").tolist()
    raw = Session(run._opened, GenerationSettings(raw=True))
    assert runtime.encode_prompt(model, tokenizer, "Hi", raw=True) == raw.tokens("Hi").tolist()


def test_it_answers_its_training_prompts_and_stops(short_skills, tmp_path, capsys):
    """On the embedded base: 9 of 10 questions are answered exactly through `dylora generate`, as typed."""
    run = learn(tmp_path, short_skills / "python", "chatml", 16)
    exact = stopped = 0
    for question, answer in TURNS:
        assert generate.main([str(run), "--prompt", question["content"], "--max-tokens", "30", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        exact += result["text"].strip() == answer["content"]
        stopped += result["reason"] == "stop"
    assert stopped == len(TURNS)
    assert exact >= 0.9 * len(TURNS)
