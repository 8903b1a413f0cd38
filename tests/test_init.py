"""`dylora init`: what it takes data for, what it writes, and that other commands read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dylora_mlx import init, train
from dylora_mlx.cli.options import parse_plan
from dylora_mlx.config import Config
from dylora_mlx.data import stream
from dylora_mlx.model.base.load import load_tokenizer
from dylora_mlx.run import propose
from tests.conftest import SMALL_BASE

WORDS = ["red", "green", "blue", "round", "flat", "heavy", "light", "near", "far", "old"]


def sentence(number: int) -> str:
    """Return a text of about 30 tokens that no other number has."""
    return " ".join(WORDS[(number * 7 + place * (number % 5 + 1)) % len(WORDS)] for place in range(12)) + f" {number}."


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The current folder: text in two languages, files of records in several forms."""
    monkeypatch.chdir(tmp_path)
    for folder, ending, count in (("notes", "md", 24), ("mixed", "py", 15), ("mixed", "md", 12), ("mixed", "sh", 2)):
        Path(folder).mkdir(exist_ok=True)
        for number in range(count):
            Path(folder, f"{number}.{ending}").write_text(f"# {sentence(number)}\n" * 6)
    rows = [{"id": n, "Question": f"Which is {sentence(n)}?", "Answer": sentence(n + 1)} for n in range(60)]
    Path("faq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("strange.jsonl").write_text("".join(json.dumps({"a": sentence(n), "b": n}) + "\n" for n in range(60)))
    Path("few.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    Path("usual").mkdir()
    for split in ("train", "validation", "test"):
        Path("usual", f"{split}.csv").write_text("text\n" + "".join(f"{sentence(n)}\n" for n in range(50)))
    return tmp_path


def made(*words: str) -> Config:
    """Run init for these sources on the small base and return the config that it wrote."""
    assert init.main([*words, "--model.base", str(SMALL_BASE), "--force"]) == 0
    return parse_plan(["my.yaml"])


def test_each_source_becomes_a_skill_in_the_given_order(place, capsys):
    config = made("usual", "faq.jsonl", "notes")
    assert [skill.name for skill in config.skills] == ["usual", "faq", "notes"]
    assert (config.skills[1].prompt, config.skills[1].completion) == ("{Question}\n", "{Answer}\n")
    assert config.model.base == str(SMALL_BASE)
    text = Path("my.yaml").read_text()
    assert '  - {name: faq, source: faq.jsonl, prompt: "{Question}\\n", completion: "{Answer}\\n"}\n' in text
    assert "  # columns id, Question, Answer: read as prompt and completion; check this with dylora data\n" in text
    assert "  # 3 .csv: plain text; 150 documents, 50 of them to learn from, with " in text
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3] == "my.yaml: 3 skills, and why; edit it as you like"
    assert lines[-2].startswith("next: dylora plan my.yaml ")
    assert lines[-1] == "then: python -m dylora_mlx.train --config my.yaml"


def test_the_counts_are_those_of_training(place, capsys):
    config = made("notes")
    source = config.skills[0]
    tokenizer = load_tokenizer(str(SMALL_BASE))
    tokenized = stream.read_tokenized(source, config.data, tokenizer, config.seed)
    skill = stream.make_skill(source, tokenized, config.data, tokenizer)
    tokens = sum(len(document.tokens) - 1 for document in tokenized.splits["train"])
    printed = capsys.readouterr().out.splitlines()[0]
    assert printed == f"notes: {skill.train.num_documents} documents to learn from, {tokens:,} tokens"
    assert config.growth.min_samples == skill.train.num_documents == 20, "fewer than the default of 32"


def test_kinds_of_text_in_one_folder_are_skills_of_their_own(place):
    config = made("mixed")
    assert [(skill.name, skill.include) for skill in config.skills] == [("mixed-py", ["*.py"]), ("mixed-md", ["*.md"])]


def test_a_folder_of_everything(place):
    Path("mixed", "faq.jsonl").write_text(Path("faq.jsonl").read_text())
    names = [skill.name for skill in made("mixed", "faq.jsonl").skills]
    assert names == ["mixed-py", "mixed-md", "faq", "faq-2"], "names are unique"


def test_many_folders_of_text_are_one_skill(place):
    for month in range(10):
        Path("diary", str(month)).mkdir(parents=True)
        for day in range(3):
            Path("diary", str(month), f"{day}.txt").write_text(sentence(10 * month + day) * 4)
    assert [(skill.name, skill.include) for skill in made("diary").skills] == [("diary", None)]


def test_a_few_folders_of_one_folder_are_skills(place):
    Path("all").mkdir()
    for name in ("notes", "usual"):
        Path(name).rename(Path("all", name))
    Path("all/.hidden").mkdir()
    assert [(skill.name, skill.source) for skill in made("all").skills] == [
        ("notes", str(place / "all/notes")),
        ("usual", str(place / "all/usual")),
    ]


def test_what_cannot_be_learned_stays_as_a_comment(place, capsys):
    config = made("few.jsonl", "strange.jsonl", "notes")
    assert [skill.name for skill in config.skills] == ["notes"]
    text = Path("my.yaml").read_text()
    assert "  # - {name: few, source: few.jsonl}\n" in text
    assert "  # left out: few.jsonl: 2 records are too few to hold some out for test\n" in text
    assert "found no text, prompt and completion" in text
    assert capsys.readouterr().out.startswith("few: left out: few.jsonl: 2 records are too few")


def test_a_large_skill_gets_a_limit(place, monkeypatch):
    monkeypatch.setattr(propose, "MAX_TOKENS", 500)
    config = made("usual")
    limit = config.skills[0].limit
    assert limit is not None
    assert 5 <= limit < 50
    text = Path("my.yaml").read_text()
    assert f"# limit: {limit} of 50 documents drawn at random; remove it to learn from all of them" in text
    tokenized = stream.read_tokenized(config.skills[0], config.data, load_tokenizer(str(SMALL_BASE)), 0)
    assert len(tokenized.splits["train"]) == limit


@pytest.mark.parametrize(
    ("lengths", "row", "epochs"),
    [
        ([[100] * 40], None, 5),  # 4,000 tokens: 4 steps an epoch
        ([[500] * 40], None, 2),  # 16 steps an epoch: two epochs are enough
        ([[100] * 40, [600] * 100], None, 3),  # the larger one has 47 steps an epoch: 150 // 47
        ([[700] * 40], 704, 2),
        ([[3000] * 40], 1024, 2),
        ([[100] * 99 + [3000]], 640, 2),  # only one document is longer
    ],
)
def test_rows_and_epochs_fit_the_documents(config, lengths, row, epochs):
    candidates = [propose.Candidate(config.skills[0], lengths=tuple(each)) for each in lengths]
    lines = propose.row_lines(candidates)
    assert lines[-1:] == ([] if row is None else [f"max_seq_length: {row}"])
    assert propose.epoch_lines(candidates)[-1] == f"epochs: {epochs}"


@pytest.mark.parametrize(("number", "rounded"), [(0.3, 1), (7.9, 7), (99, 99), (123, 120), (98765, 98000)])
def test_limits_are_round(number, rounded):
    assert propose.round_down(number) == rounded


def test_a_base_of_another_size_names_what_its_preset_sets():
    lines = propose.model_lines("google/gemma-3-270m")
    assert "preset small, which sets training.learning_rate 0.0005" in lines[0]
    assert lines[1] == "model: {base: google/gemma-3-270m}"


def test_paths_are_relative_to_the_config_or_absolute(place):
    assert made("notes").skills[0].source == str(place / "notes")
    assert "source: notes," not in Path("my.yaml").read_text()
    assert "{name: notes, source: notes}" in Path("my.yaml").read_text()
    Path("configs").mkdir()
    base = ["--model.base", str(SMALL_BASE)]
    assert init.main(["notes", "packaged/sql", *base, "--out", "configs/a.yaml"]) == 0
    assert [skill.source for skill in parse_plan(["configs/a.yaml"]).skills] == [str(place / "notes"), "packaged/sql"]


def test_nothing_is_overwritten_without_force(place, capsys):
    Path("my.yaml").write_text("mine")
    assert init.main(["notes", "--model.base", str(SMALL_BASE)]) == 2
    error = capsys.readouterr().err
    assert error == "error: my.yaml: exists already; --force replaces it, --out writes another file\n"
    assert Path("my.yaml").read_text() == "mine"


def test_a_run_learns_what_was_written(place):
    made("notes", "faq.jsonl")
    options = [
        "--training.max_steps",
        "1",
        "--training.memory_tokens",
        "64",
        "--growth.dense_steps",
        "0",
        "--growth.anneal_steps",
        "0",
    ]
    assert train.main(["--config", "my.yaml", "--runs", "runs", *options, "--data.max_seq_length", "128"]) == 0
    assert (place / "runs/my/results.json").is_file()
