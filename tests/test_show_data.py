"""dylora data: counts, and documents as training learns them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dylora_mlx import assets, plan, show_data, train
from dylora_mlx.cli.options import parse_data
from dylora_mlx.config import DataConfig, Source
from dylora_mlx.data import inspect
from dylora_mlx.data.inspect import Part
from dylora_mlx.data.stream import read_tokenized
from dylora_mlx.errors import UserError
from dylora_mlx.model.base.tokenizer import Tokenizer
from dylora_mlx.run import forecast
from tests.conftest import SMALL_BASE, start
from tests.reporting.synthetic import sound

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello 0!"}]
CONFIG = """
skills: [{name: qa, source: qa.jsonl}, {name: chats, source: chats}]
growth: {base_skill: {name: known, source: packaged/python, limit: 12}}
domains: [{name: sql, source: packaged/sql, limit: 12}]
"""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(assets.BASE)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The current folder, with a file of questions, a folder of chats with its own splits, and a config of both."""
    questions = [{"question": f"What is {i} + {i}?\n", "answer": str(2 * i)} for i in range(40)]
    lines(tmp_path / "columns.jsonl", questions)
    lines(tmp_path / "qa.jsonl", [{"prompt": row["question"], "completion": row["answer"]} for row in questions])
    (tmp_path / "chats").mkdir()
    for split, count in (("train", 34), ("validation", 3), ("test", 2)):
        chats = [{"messages": [CHAT[0], {**CHAT[1], "content": f"Hello {split} {i}!"}]} for i in range(count)]
        lines(tmp_path / "chats" / f"{split}.jsonl", chats)
    (tmp_path / "two.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def shown(capsys, *arguments: str) -> str:
    """Run the command, and return what it prints, with blanks as they are."""
    assert show_data.main(list(arguments)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def objects(capsys, *arguments: str) -> list[dict]:
    return [json.loads(line) for line in shown(capsys, *arguments, "--json").splitlines()]


def test_a_config_shows_every_source(place, capsys):
    out = shown(capsys, "two.yaml", "--docs", "1")
    headings = [line for line in out.splitlines() if line and line[0].isalpha()]
    assert headings == [
        "known: what the base knows already (growth.base_skill)",
        "qa",
        "chats",
        "sql: evaluated, never learned (domains)",
        show_data.MIXED,
    ]
    assert "  form: prompts and completions\n" in out
    assert "  form: chats in the gemma template that comes with the package\n" in out
    assert out.count("  generate --prompt TEXT asks: ") == 2, "of the two skills that are learned"


def test_counts_of_a_source(place, capsys, tokenizer):
    """Numbers of tokens are those of the texts: each prompt, and each answer with EOS."""
    out = shown(capsys, "qa.jsonl", "--docs", "0")
    documents = objects(capsys, "qa.jsonl")
    for split, count in (("train", 32), ("validation", 4), ("test", 4)):
        texts = [document["text"] for document in documents if document["split"] == split]
        answers = [text.partition("\n")[2].removesuffix("<eos>") for text in texts]
        learned = sum(len(tokenizer.encode_text(answer)) + 1 for answer in answers)
        prompts = [text.partition("\n")[0].removeprefix("<bos>") + "\n" for text in texts]
        context = sum(len(tokenizer.encode_text(prompt)) for prompt in prompts)
        [row] = [line for line in out.splitlines() if line.startswith(f"│ {split} ")]
        numbers = [cell.strip() for cell in row.split("│")[2:8]]
        assert numbers == [str(n) for n in (count, count, context + learned, learned, context, 0)]
    assert "  from: qa.jsonl (train); drawn from train (validation, test)\n" in out
    assert "« and »" not in out, "no documents were wanted"


@pytest.mark.parametrize(
    ("arguments", "source"),
    [
        (["qa.jsonl"], Source("qa", "qa.jsonl")),
        (["columns.jsonl", "--prompt", "Q: {question}", "--completion", "{answer}"],
         Source("columns", "columns.jsonl", prompt="Q: {question}", completion="{answer}")),
        (["columns.jsonl", "--text", "{question}{answer}", "--name", "sums", "--limit", "9", "--seed", "3"],
         Source("sums", "columns.jsonl", text="{question}{answer}", limit=9)),
        (["chats"], Source("chats", "chats")),
        (["chats", "--split", "test", "--mask_prompt", "false"], Source("chats", "chats", split="test", mask_prompt=False)),
        (["packaged/sql", "--contains", "SELECT"], Source("sql", "packaged/sql", contains="SELECT")),
    ],
)  # fmt: skip
def test_json_is_what_training_learns(place, capsys, tokenizer, arguments, source):
    seed = 3 if "--seed" in arguments else 0
    tokenized = read_tokenized(source, DataConfig(), tokenizer, seed)
    expected = [
        (split, *map(tuple, document)) for split, documents in tokenized.splits.items() for document in documents
    ]
    found = objects(capsys, *arguments)
    assert [(o["split"], tuple(o["ids"]), tuple(o["learned"])) for o in found] == expected
    for document in found:
        assert document.keys() == {"skill", "split", "text", "ids", "learned", "segments"}
        assert document["skill"] == source.name
        assert "".join(part["text"] for part in document["segments"]) == document["text"]
        assert document["text"] == inspect.decode(document["ids"], tokenizer)


def test_a_document_in_json(place, capsys, tokenizer):
    (place / "one").mkdir()
    for split, prompts in (("train", "bc"), ("validation", "d"), ("test", "a")):
        lines(place / "one" / f"{split}.jsonl", [{"prompt": prompt, "completion": " b"} for prompt in prompts])
    prompt, answer = [tokenizer.bos_token_id, *tokenizer.encode_text("a")], tokenizer.encode_text(" b")
    assert objects(capsys, "one", "--show", "test") == [
        {
            "skill": "one", "split": "test", "text": "<bos>a b<eos>", "ids": [*prompt, *answer, tokenizer.eos_token_id],
            "learned": [0] * len(prompt) + [1] * (len(answer) + 1),
            "segments": [{"text": "<bos>a", "learned": False}, {"text": " b<eos>", "learned": True}],
        }
    ]  # fmt: skip


def test_splits_and_numbers_of_documents(place, capsys):
    assert len(objects(capsys, "chats")) == 34 + 3 + 2
    assert [o["split"] for o in objects(capsys, "chats", "--show", "test", "--show", "validation")] == ["test"] * 2 + [
        "validation"
    ] * 3
    assert [o["split"] for o in objects(capsys, "chats", "--docs", "1")] == ["train", "validation", "test"]
    assert objects(capsys, "chats", "--docs", "0") == []
    out = shown(capsys, "chats", "--show", "validation", "--docs", "9")
    assert [line.partition(":")[0] for line in out.splitlines() if ", document " in line] == [
        f"  validation, document {number} of 3" for number in (1, 2, 3)
    ]
    assert shown(capsys, "chats").count(", document ") == show_data.DOCS


def test_what_is_learned_is_marked_where_there_are_no_colours(place, capsys):
    out = shown(capsys, "chats", "--docs", "1")
    first = json.loads((place / "chats" / "train.jsonl").read_text().splitlines()[0])["messages"][1]["content"]
    assert (
        f"  <bos><start_of_turn>user\n  Hi<end_of_turn>\n  <start_of_turn>model\n  «{first}<end_of_turn><eos>»\n" in out
    )
    assert out.endswith("asks: <bos><start_of_turn>user⏎TEXT<end_of_turn>⏎<start_of_turn>model⏎\n\n")


@pytest.mark.parametrize("name", ["chatml", "mine.jinja"])
def test_another_chat_template(place, capsys, name):
    """By name or from a file. A template that a base lacks is also how generate asks."""
    (place / "mine.jinja").write_text("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    out = shown(capsys, "chats", "--docs", "1", "--data.chat_template", name)
    answer = json.loads((place / "chats" / "train.jsonl").read_text().splitlines()[0])["messages"][1]["content"]
    if name == "chatml":
        assert "  form: chats in the chatml template that comes with the package\n" in out
        assert f"  <|im_start|>user\n  Hi<|im_end|>\n  <|im_start|>assistant\n  «{answer}<|im_end|><eos>»\n" in out
        assert "asks: <|im_start|>user⏎TEXT<|im_end|>⏎<|im_start|>assistant⏎\n" in out
    else:
        assert "  form: chats in the template of data.chat_template\n" in out
        assert f"  user: Hi\n  assistant:« {answer}<eos>»\n" in out
        assert "asks: user: TEXT⏎assistant:\n" in out


def test_colours():
    parts = [Part("<bos>Q", False), Part("A<eos>", True)]
    text = show_data.document_text(parts, marked=False)
    assert text.plain == "  <bos>QA<eos>"
    assert [(text.plain[span.start : span.end], span.style) for span in text.spans] == [
        ("<bos>Q", show_data.CONTEXT),
        ("A<eos>", show_data.LEARNED),
    ]
    assert show_data.document_text(parts, marked=True).plain == "  <bos>Q«A<eos>»"


def test_control_characters_do_not_reach_the_terminal():
    text = show_data.document_text([Part("a\x1b[31m\r\x07\x9b\x7f\tb\nc[bold]", True)], marked=False)
    assert text.plain == "  a␛[31m␍␇\ufffd␡\tb\n  c[bold]"


def test_long_documents_are_shown_in_part():
    text = "a" * 700 + "b" * 300 + "c" * 250
    assert show_data.shortened(text) == "a" * 600 + " … 400 characters … " + "c" * 250
    assert show_data.shortened("a" * show_data.MAX_PART) == "a" * show_data.MAX_PART
    turns = [Part("a" * 800, number % 2 == 1) for number in range(20)]
    plain = show_data.document_text(turns, marked=False).plain
    assert plain.endswith(f" … {12 * 800:,} more characters in 12 parts")


def test_long_and_empty_records_are_said(place, capsys):
    """Rows of 16: a prompt of 40 tokens and its answer make 3 windows, the first 2 of them without a learned token."""
    rows = [{"prompt": f"n{i} ", "completion": "y" if i else ""} for i in range(40)]
    lines(
        place / "odd.jsonl",
        [*rows, {"prompt": "x" + " x" * 39, "completion": "y"}],
    )
    out = shown(capsys, "odd.jsonl", "--data.max_seq_length", "16")
    assert (
        "  1 record left out because nothing would be learned: an empty completion, or a chat without an answer\n"
        in out
    )
    assert (
        "  1 of 40 documents longer than 16 tokens (data.max_seq_length): cut into 3 windows, 2 of them dropped because "
        "nothing in them is learned\n"
    ) in out
    assert "  33 to 48  █ 1 (cut)\n" in out


def test_copies_and_leakage_are_said(place, capsys):
    """60 records of 12 texts, split by the source itself: 8 of them in train and test, and 3 copies within validation."""
    (place / "copies").mkdir()
    texts = [{"text": f"text number {i}"} for i in range(12)]
    lines(place / "copies" / "train.jsonl", texts[:10] * 5)
    lines(place / "copies" / "valid.jsonl", [texts[10]] * 4)
    lines(place / "copies" / "test.jsonl", [*texts[:5], texts[11]])
    out = shown(capsys, "copies", "--docs", "0")
    assert "  from: train.jsonl (train); valid.jsonl (validation); test.jsonl (test)\n" in out
    assert "  48 of 60 records copies of an earlier one\n" in out
    assert "  5 of 6 test records also in train: the test loss does not measure what is new\n" in out
    assert "of 4 validation records" not in out


def test_files_of_a_folder_are_counted(place, capsys):
    for name in ("src/a.py", "src/b.PY", "1.md", "2.md", "3.md", ".venv/lib/c.py", "node_modules/x/d.js", "src/e.png"):
        (place / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "project" / name).write_text(f"text of {name}\n")
    out = shown(capsys, "project", "--docs", "0")
    assert "  files: 3 .md, 2 .py; left out: 1 in .venv, 1 in node_modules, 1 with another ending\n" in out
    out = shown(capsys, "project", "--docs", "0", "--exclude", "[src/]")
    assert "  files: 3 .md; left out: " in out


def test_data_that_training_refuses(place, capsys):
    lines(place / "few.jsonl", [{"text": f"text {i}"} for i in range(20)])
    out = shown(capsys, "few.jsonl")
    assert (
        "  train would refuse it: skill 'few' (few.jsonl): 16 training documents, at least 32 are needed (growth.min_samples)\n"
        in out
    )
    assert "would refuse" not in shown(capsys, "chats")
    (place / "few.yaml").write_text(
        "skills: [{name: few, source: few.jsonl}]\ngrowth: {base_skill: null, min_samples: 8, min_tokens: 10}\n"
    )
    assert "would refuse" not in shown(capsys, "few.yaml")


def test_another_tokenizer_without_its_weights(place, capsys, tokenizer):
    """The base's folder has no weights at all. Its tokenizer ends texts with another token."""
    folder = place / "other"
    shutil.copytree(SMALL_BASE, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<pad>"}))
    first = objects(capsys, "qa.jsonl", "--model.base", "other", "--docs", "1")[0]
    assert first["ids"][-1] == tokenizer.encode_text("<pad>")[0] != tokenizer.eos_token_id
    assert first["text"].endswith("<pad>")


def test_only_the_tokenizer_of_a_hub_base_is_downloaded(place, capsys, monkeypatch):
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(SMALL_BASE)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert objects(capsys, "qa.jsonl", "--model.base", "google/some-model", "--docs", "1")
    assert asked == [("google/some-model", ["*.json", "*.jinja", "tokenizer*"])]


def test_no_base_is_loaded(place, capsys, monkeypatch):
    monkeypatch.setattr("mlx_lm.utils.load_model", lambda *_, **__: pytest.fail("the weights were loaded"))
    assert shown(capsys, "two.yaml")


def test_an_encoding_without_these_characters(place):
    command = [sys.executable, "-m", "dylora_mlx", "data", "chats", "--docs", "1"]
    found = subprocess.run(command, capture_output=True, cwd=place, env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert (found.returncode, found.stderr) == (0, b"")
    assert "«Hello train".encode("latin-1") in found.stdout
    assert b"?????" in found.stdout, "the bars"


def test_the_table_fits_a_terminal_of_80_columns(place):
    command = [sys.executable, "-m", "dylora_mlx", "data", "chats", "--docs", "0"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=place, env={**os.environ, "COLUMNS": "80"})
    rows = [line for line in found.stdout.splitlines() if line.startswith(("│", "┃"))]
    assert [row.split()[1] for row in rows] == ["split", "train", "validation", "test"]
    assert "…" not in found.stdout


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_a_reader_that_leaves(place, option):
    """`... | head -c 1` ends the command silently."""
    command = f"{sys.executable} -m dylora_mlx data two.yaml {' '.join(option)} | head -c 1; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=place)
    assert (found.returncode, found.stderr, len(found.stdout)) == (141, "", 1)


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("data/notes.jsonl", "notes"), ("shards/notes.jsonl.gz", "notes"), ("packaged/sql", "sql"), ("a b/ü ö.txt", "-"),
        ("owner/v1.5-data", "v1"), ("a/" + "n" * 90, "n" * 64), ("./_x", "x"), ("a/*.jsonl", "data"),
    ],
)  # fmt: skip
def test_the_name_of_a_source(place, word, name):
    assert parse_data([word]).config.skills[0].name == (name if name != "-" else "data")
    assert parse_data([word, "--name", "mine"]).config.skills[0].name == "mine"


def test_a_config_or_a_source(place):
    """A shipped config's name and every .yaml file is a config; everything else is a source."""
    (place / "quickstart").mkdir()
    assert [skill.name for skill in parse_data(["quickstart"]).config.skills] == [
        "requests",
        "flask",
        "requests_more",
        "stripe",
        "sql",
    ]
    assert parse_data(["./quickstart"]).config.skills == [Source("quickstart", "./quickstart")]
    options = parse_data(["two.yaml", "--seed", "5", "--data.max_seq_length", "64", "--docs", "2", "--show", "test"])
    assert (options.is_source, options.docs, options.show, options.json) == (False, 2, ["test"], False)
    assert (options.config.seed, options.config.data.max_seq_length) == (5, 64)
    options = parse_data(["qa.jsonl", "--preset", "mbpp", "--model.base", "embedded", "--json"])
    assert (options.is_source, options.config.skills[0].preset, options.json) == (True, "mbpp", True)
    assert options.config.growth.base_skill is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["two.yaml", "--prompt", "x"],
            "--prompt: an option of a source; in a config it belongs to an entry of skills",
        ),
        (["two.yaml", "--split", "test"], "--show chooses the split to show"),
        (["two.yaml", "--name", "x"], "--name: an option of a source"),
        (["qa.jsonl", "--growth.threshold", "1"], "--growth.threshold: an option of a config; with a source"),
        (["qa.jsonl", "--model.rank", "4"], "--model.rank: an option of a config"),
        (["qa.jsonl", "--skills", "[]"], "--skills: an option of a config"),
        (["nothing"], "nothing: neither a config nor a source; give a YAML file, one of"),
        (["qa.jsonl", "--docs", "-1"], "--docs -1: out of its range"),
        ([], "CONFIG|SOURCE"),
    ],
)
def test_options_that_do_not_fit(place, argv, message):
    with pytest.raises(UserError) as caught:
        parse_data(argv)
    assert message in str(caught.value)


ODD = """
skills: [{name: odd, source: odd}]
growth: {base_skill: null, bootstrap: 50, min_samples: 8, min_tokens: 50, policy: threshold}
data: {max_seq_length: 16}
training: {max_steps: 1, memory_tokens: 128, router_fit_steps: 2}
"""
REMARKS = [
    "1 record left out because nothing would be learned: an empty completion, or a chat without an answer",
    "1 of 24 documents longer than 16 tokens (data.max_seq_length): cut into 3 windows, 2 of them dropped because "
    "nothing in them is learned",
    "1 of 25 records copies of an earlier one",
    "1 of 2 validation records also in train: the validation loss does not measure what is new",
]


def test_the_same_counts_in_training_in_the_report_and_in_a_plan(tmp_path, capsys, monkeypatch):
    rows = [{"prompt": f"n{i} ", "completion": f"y{i}"} for i in range(24)]
    (tmp_path / "odd").mkdir()
    long, empty = {"prompt": "x" + " x" * 39, "completion": "y"}, {"prompt": "z", "completion": ""}
    for split, of_split in (
        ("train", [*rows[:20], long, empty]),
        ("validation", [rows[0], rows[20]]),
        ("test", rows[21:22]),
    ):
        lines(tmp_path / "odd" / f"{split}.jsonl", of_split)
    assert train.main(start(tmp_path, ODD)) == 0
    out, err = capsys.readouterr()
    assert err == f"warning: odd: {'; '.join(REMARKS)}\n"
    assert "records" not in out
    kept = json.loads((tmp_path / "small" / "run.json").read_text())["data"]["odd"]
    assert kept["remarks"] == REMARKS
    counts = kept["splits"]["train"]
    assert (counts["records"], counts["documents"], counts["cut"], counts["windows"], counts["dropped"]) == (
        22,
        21,
        1,
        3,
        2,
    )
    text = sound((tmp_path / "small" / "report.html").read_text()).text
    assert f"odd prompts and completions 21 2 1 {counts['tokens']} {counts['learned']} 1" in text
    assert all(f"odd: {remark}" in text for remark in REMARKS)

    monkeypatch.setattr(forecast, "measure_cost", lambda *_: forecast.MeasuredCost(1.0, 1.0, 1, 1))
    assert plan.main([str(tmp_path / "small.yaml"), "--model.base", str(SMALL_BASE)]) == 0
    planned = capsys.readouterr().out
    cells = [cell.strip() for cell in next(line for line in planned.splitlines() if "create -> 1" in line).split("│")]
    assert cells[1:5] == ["odd", "21", str(counts["tokens"]), str(counts["learned"])]
    assert all(f"odd: {remark}\n" in planned for remark in REMARKS)

    told = shown(capsys, str(tmp_path / "small.yaml"), "--docs", "0")
    numbers = (
        "22",
        "21",
        str(counts["tokens"]),
        str(counts["learned"]),
        str(counts["tokens"] - counts["learned"]),
        "1",
        "3",
    )
    [row] = [line for line in told.splitlines() if line.startswith("│ train")]
    assert [cell.strip() for cell in row.split("│")[2:9]] == list(numbers)
    assert all(f"  {remark}\n" in told for remark in REMARKS)
