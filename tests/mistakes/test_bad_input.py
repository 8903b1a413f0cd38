"""Mistakes of users with train: one line on stderr, exit code 2, no file left behind, and no model work before the error."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from dylora_mlx import assets, train
from dylora_mlx.model.base import load as bases
from dylora_mlx.run import run_folder

RECORD = json.dumps({"text": "def f(x):\n    return x + 1\n"}) + "\n"
LONG = json.dumps({"text": "def f(x):\n    return x + 1\n" * 10}) + "\n"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty current folder, without the hub. Building the routed model fails the test."""

    def fail(*args, **kwargs):
        pytest.fail("model work began before the mistake was found")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder, "RoutedDecoder", fail)
    monkeypatch.setattr(bases, "_download", fail)
    return tmp_path


@pytest.fixture
def refuse(place, capfd):
    """A function that runs train, checks the form of its error, and returns the error line."""

    def run(*argv: str) -> str:
        before = sorted(place.rglob("*"))
        capfd.readouterr()
        code = train.main(list(argv))
        output = capfd.readouterr()
        assert code == 2, output
        assert output.err.startswith("error: ")
        assert output.err.count("\n") == 1
        assert output.err.endswith("\n")
        assert "Traceback" not in output.err + output.out
        assert sorted(place.rglob("*")) == before
        return output.err

    return run


@pytest.fixture
def no_base(monkeypatch):
    """Fail the test if the base is loaded: for mistakes that must be found earlier."""
    monkeypatch.setattr(
        run_folder, "load_base", lambda *args: pytest.fail("the base was loaded before the mistake was found")
    )


@pytest.fixture
def loaded(monkeypatch, base):
    """Use the session's base: for mistakes in the data, which are found with a tokenizer."""
    monkeypatch.setattr(run_folder, "load_base", lambda *args: base)


def stream(place: Path, source: str, more: str = "", name: str = "mine") -> list[str]:
    """Write a config with one skill; return the arguments for it."""
    path = place / "config.yaml"
    path.write_text(f"skills:\n  - {{name: {name}, source: '{source}'{more}}}\n")
    return ["--config", str(path)]


def file(place: Path, content: str | bytes, name: str = "mine.jsonl") -> str:
    """Write a file; return its path."""
    path = place / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


OPTIONS = [
    (["--nosuch", "1"], ["--nosuch"]),
    (["--training.nosuch", "1"], ["--training.nosuch"]),
    (["stray"], ["stray"]),
    (["--training.epochs"], ["--training.epochs", "expected one argument"]),
    (["--training.epochs", "two"], ["training.epochs", "int", "two"]),
    (["--training.epochs", "1.5"], ["training.epochs", "int", "1.5"]),
    (["--training.grad_checkpoint", "maybe"], ["training.grad_checkpoint", "maybe"]),
    (["--model.dtype", "int8"], ["model.dtype", "bfloat16", "int8"]),
    (["--model.router_layer", "last"], ["model.router_layer", "final", "last"]),
    (["--model.router_layer", "-1"], ["router_layer: -1"]),
    (["--model.projections", "[q_proj, lm_head]"], ["projections", "lm_head", "gate_proj"]),
    (["--training.epochs", "0"], ["training.epochs: 0 is not at least 1"]),
    (["--growth.rank.max", "0"], ["growth.rank.max: 0 is not at least 1"]),
    (["--training.learning_rate", "5"], ["learning_rate: 5.0", "between 0 and 1"]),
    (["--training.learning_rate", ".nan"], ["learning_rate: nan"]),
    (["--model.alpha", ".inf"], ["alpha: inf", "finite"]),
    (["--seed", "-1"], ["seed: -1"]),
    (["--training.early_stop_domain", "nosuch"], ["early_stop_domain", "nosuch", "current, python, requests"]),
    (["--config"], ["--config needs"]),
    (["--config="], ["no such config file"]),
    (["--config", "nosuch.yaml"], ["nosuch.yaml: no such config file", "quickstart"]),
    (["--config", "."], ["no such config file"]),
    (["--name", "a/b"], ["--name a/b", "--runs"]),
    (["--resume"], ["--resume takes one run folder"]),
    (["--resume", "a", "--seed", "1"], ["--resume takes one run folder"]),
    (["--resume", "nosuch"], ["nosuch: no run here"]),
]


@pytest.mark.parametrize(("argv", "words"), OPTIONS, ids=lambda value: " ".join(value) if value else "none")
def test_options(refuse, no_base, argv, words):
    line = refuse(*argv)
    assert all(word in line for word in words), line


SKILL = "skills:\n  - {name: a, source: packaged/sql}\n"
CONFIGS = [
    ("unknown section", SKILL + "trainin: {epochs: 1}\n", ["trainin"]),
    (
        "unknown option",
        SKILL + "training: {epoch: 1}\n",
        ["training.epoch: no such option", "did you mean training.epochs?"],
    ),
    ("unknown option of a skill", "skills:\n  - {name: a, source: b/c, presett: mbpp}\n", ["skills", "presett"]),
    ("wrong type", SKILL + "training: {epochs: many}\n", ["training.epochs", "int", "many"]),
    ("a list for a section", SKILL + "training: [1]\n", ["training"]),
    ("an impossible value", SKILL + "growth: {threshold: 2}\n", ["threshold: 2", "cosine"]),
    ("a skill without a name", "skills:\n  - {source: packaged/sql}\n", ["skills", "name"]),
    ("a skill without a source", "skills:\n  - {name: a, source: ''}\n", ["skill 'a' names no source"]),
    (
        "a skill that is a word",
        "skills: [packaged/sql]\n",
        ["config.yaml: skills: 'packaged/sql'", "name: sql, source:"],
    ),
    ("two skills of one name", SKILL + "  - {name: a, source: packaged/flask}\n", ["two skills", "'a'"]),
    (
        "a skill named like the base's",
        "skills:\n  - {name: python, source: packaged/sql}\n",
        ["two skills", "'python'"],
    ),
    ("no skills", "seed: 1\n", ["skills"]),
    ("an empty stream", "skills: []\n", ["skills: the stream is empty"]),
    ("an empty file", "", ["config.yaml: no options"]),
    ("a word", "hello\n", ["config.yaml: no options"]),
    ("a list", "- a\n", ["config.yaml: no options"]),
    ("an open bracket", "skills: [\n  - {name: a\n", ["config.yaml: not YAML", "line 2"]),
    ("a tab", "skills:\n\t- a\n", ["config.yaml: not YAML", "line 2"]),
    ("not UTF-8", b"seed: 1\nskills: caf\xe9\n", ["config.yaml, line 2: not UTF-8"]),
    (
        "unknown packaged skill",
        "skills:\n  - {name: a, source: packaged/nosuch}\n",
        ["packaged/nosuch", "flask, python"],
    ),
    ("missing file", "skills:\n  - {name: a, source: no.jsonl}\n", ["no.jsonl: no such file or folder", "skill 'a'"]),
    ("missing folder", "skills:\n  - {name: a, source: ./no}\n", ["/no: no such file or folder"]),
    ("missing domain", SKILL + "domains:\n  - {name: d, source: no.jsonl}\n", ["no.jsonl: no such file", "skill 'd'"]),
]


@pytest.mark.parametrize(("text", "words"), [case[1:] for case in CONFIGS], ids=[case[0] for case in CONFIGS])
def test_configs(place, refuse, no_base, text, words):
    line = refuse("--config", file(place, text, "config.yaml"))
    assert all(word in line for word in words), line


DATA = [
    ("empty", "", "", ["the file has no records"]),
    ("only blank lines", "\n \n", "", ["the file has no records"]),
    ("malformed line", RECORD * 2 + '{"text": \n' + RECORD, "", ["line 3: not JSON (Expecting value)"]),
    ("cut off", RECORD * 3 + RECORD[:-9], "", ["line 4: not JSON (Unterminated string"]),
    ("nested", RECORD + '{"text": ' + "[" * 100_000, "", ["line 2: not JSON (nested too deeply)"]),
    ("mis-encoded", (RECORD * 4).encode() + b'{"text": "caf\xe9"}\n', "", ["line 5: not UTF-8 (byte 0xe9)"]),
    ("UTF-16", (RECORD * 4).encode("utf-16"), "", ["line 1: not UTF-8"]),
    ("a list", RECORD + "[1, 2]\n", "", ["line 2: a JSON list, but every line must be one JSON object"]),
    ("a word", RECORD * 2 + '"word"\n', "", ["line 3: a JSON str"]),
    ("two types", RECORD * 39 + '{"text": 5}\n', "", ["line 40: found no text", "in the columns text"]),
    ("other columns", '{"content": "a"}\n' * 40, "", ["mine.jsonl, line ", "columns content", "prompt and completion"]),
    ("a number", '{"text": 5}\n' * 40, "", ["mine.jsonl, line ", ": found no text"]),
    ("missing column", RECORD * 40, ", text: '{code}'", ["no column 'code', there are text"]),
    (
        "Alpaca's columns",
        RECORD * 40,
        ", preset: alpaca",
        ["preset alpaca needs instruction and output", "columns text"],
    ),
    ("ShareGPT's column", RECORD * 40, ", preset: sharegpt", ["found no text", "in the columns text"]),
    ("patterns for a file", RECORD * 40, ", include: ['*.py']", ["include and exclude choose files of a folder"]),
    ("an array in .jsonl", "[\n" + RECORD, "", ["line 1: not JSON", "a file with one JSON array ends in .json"]),
    ("preset's column", RECORD * 40, ", preset: code_alpaca", ["no column 'instruction', there are text"]),
    ("bad message", '{"messages": [{"role": "user"}]}\n' * 40, "", ["messages, message 1: role and content"]),
    ("empty document", RECORD * 40, ", text: ''", [": the document is empty"]),
    ("one record", RECORD, "", ["1 records are too few"]),
    ("few samples", LONG * 30, "", ["skill 'mine'", "24 training documents", "32 are needed (growth.min_samples)"]),
    (
        "few tokens",
        '{"text": "x"}\n' * 60,
        "",
        ["skill 'mine'", "training tokens", "1000 are needed (growth.min_tokens)"],
    ),
    ("nothing contains it", RECORD * 40, ", contains: cobol", ["no record contains 'cobol'"]),
    ("no such split", RECORD * 40, ", split: dev", ["has no split 'dev'"]),
]


@pytest.mark.parametrize(("content", "more", "words"), [case[1:] for case in DATA], ids=[case[0] for case in DATA])
def test_data_files(place, refuse, loaded, content, more, words):
    path = file(place, content)
    line = refuse(*stream(place, path, more))
    assert path in line
    assert all(word in line for word in words), line


def test_a_domain_of_bad_data_is_found_too(place, refuse, loaded):
    path = file(place, RECORD + "[]\n")
    config = file(place, f"{SKILL}domains:\n  - {{name: d, source: '{path}'}}\n", "config.yaml")
    assert f"{path}, line 2: a JSON list" in refuse("--config", config)


FILES = [
    ("report.pdf", b"%PDF-1.7", ["report.pdf: a PDF document; what is read: .jsonl", "convert the file"]),
    ("notes.docx", b"PK\x03\x04", ["an office document; what is read"]),
    ("notes.rtf", b"{\\rtf1", ["notes.rtf: an RTF document"]),
    ("server.log", b"GET /", ["the ending .log is not known", "rename or convert the file"]),
    ("s.parquet", b"PAR1", ["s.parquet: cannot be read as Parquet"]),
    ("s.jsonl.gz", b"text", ["s.jsonl.gz: cannot be decompressed"]),
    ("s.json", b'{"text": ["a", "b"]}', ["a JSON object without a list of records; needed is an array of objects"]),
    ("s.csv", b"a,b\n1,2\n1,2,3\n", ["s.csv, line 3: 3 fields, but the first line names 2 columns (a, b)"]),
    ("book.txt", b"One paragraph.\n", ["book.txt: 1 records are too few"]),
]


@pytest.mark.parametrize(("name", "content", "words"), FILES, ids=[case[0] for case in FILES])
def test_files_of_other_formats(place, refuse, loaded, name, content, words):
    path = file(place, content, name)
    line = refuse(*stream(place, path))
    assert all(word in line for word in words), line


FOLDERS = [
    (["train.jsonl", "valid.jsonl", "val.jsonl"], "", ["val.jsonl and valid.jsonl are both the validation split"]),
    (["train.jsonl", "train.csv"], "", ["train.csv and train.jsonl are both the train split", "exclude"]),
    (["train-00000-of-00002.jsonl"], "", ["of the 2 files of this split, number 1 is missing"]),
    (["train.jsonl"], ", split: dev", ["folder/dev.jsonl: no such file, the split 'dev' of skill 'mine'"]),
    (["a.py", "b.py"], ", include: ['*.rs']", ["no text file is left of this folder by include and exclude"]),
    (["a.py", "b.py"], ", include: ['../*.py']", ["include: ['../*.py'] of skill 'mine' is not a list of patterns"]),
    (["a.py", "b.py"], ", exclude: '*.py'", ["exclude: '*.py' should be list of str or null"]),
    (
        ["data.jsonl"],
        "",
        ["neither train.jsonl nor text files", "it has data.jsonl: name the file, or write a pattern"],
    ),
    ([".venv/a.py", "node_modules/b.js"], "", ["nor text files", "left out: 1 in .venv, 1 in node_modules"]),
]


@pytest.mark.parametrize(("names", "more", "words"), FOLDERS)
def test_folders(place, refuse, loaded, names, more, words):
    for name in names:
        (place / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        file(place / "folder", RECORD * 40, name)
    line = refuse(*stream(place, "folder", more))
    assert all(word in line for word in words), line


def test_a_pattern_that_matches_nothing(place, refuse, no_base):
    assert "no file matches this pattern (skill 'mine')" in refuse(*stream(place, "data/*.jsonl"))


def test_a_folder_without_text(place, refuse, loaded):
    (place / "folder").mkdir()
    assert "neither train.jsonl nor text files" in refuse(*stream(place, "folder"))


def test_a_mis_encoded_file_in_a_folder(place, refuse, loaded):
    (place / "folder").mkdir()
    (place / "folder/good.py").write_text("x = 1\n")
    (place / "folder/latin.py").write_bytes(b"x = 1\n# caf\xe9\n")
    line = refuse(*stream(place, "folder"))
    assert "latin.py, line 2: not UTF-8 (byte 0xe9)" in line


def test_a_base_skill_that_is_too_small(place, refuse, loaded):
    path = file(place, LONG * 10)
    config = file(place, f"{SKILL}growth: {{base_skill: {{name: b, source: '{path}'}}}}\n", "config.yaml")
    assert "skill 'b'" in refuse("--config", config)


@pytest.fixture
def copied(place) -> Path:
    """A folder with copies of the embedded base's small files and a link to its weights."""
    folder = place / "base"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(assets.BASE / name, folder)
    (folder / "model.safetensors").symlink_to(assets.BASE / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", ["/nosuch/base", "./nosuch", "nosuch", "a/b/c"])
def test_a_base_that_is_not_there(refuse, name):
    assert (
        f"{name.removeprefix('.')}: no such folder; model.base is embedded, a folder, a GGUF file, or a hub id"
        in refuse("--model.base", name)
    )


def test_a_base_that_is_a_file(place, refuse):
    assert "no such folder" in refuse("--model.base", file(place, "x", "weights.bin"))


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("config.json", "no config.json, so not a model folder"),
        ("model.safetensors", "no weights (model*.safetensors)"),
        ("tokenizer.json", "no tokenizer (tokenizer.json or tokenizer.model)"),
    ],
)
def test_a_base_folder_that_lacks_a_file(copied, refuse, missing, words):
    (copied / missing).unlink()
    line = refuse("--model.base", str(copied))
    assert f"{copied}: {words}" in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model_type": "mistral"}', ["'mistral'", "must be one of model_type gemma3_text, llama, qwen3"]),
        ('{"model_type": "gemma3", "text_config": {}}', ["Gemma 3 model with vision", "dylora convert-base"]),
        ("{}", ["must be one of model_type"]),
        ("[]", ["must be one of model_type"]),
        ("{", ["config.json: not a readable JSON file"]),
        ('{"model_type": "gemma3_text", "hidden_size": 64}', ["could not be loaded"]),
    ],
)
def test_a_base_of_another_kind(copied, refuse, text, words):
    (copied / "config.json").write_text(text)
    line = refuse("--model.base", str(copied))
    assert all(word in line for word in [str(copied), *words]), line


@pytest.mark.parametrize("size", [0, 5, 4000, 5_000_000, -1])
def test_truncated_weights(copied, refuse, size):
    content = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").unlink()
    (copied / "model.safetensors").write_bytes(content[:size])
    assert f"{copied}: the base could not be loaded" in refuse("--model.base", str(copied))


def test_a_damaged_tokenizer(copied, refuse):
    (copied / "tokenizer.json").write_text("{")
    assert f"{copied}: the base could not be loaded" in refuse("--model.base", str(copied))


@pytest.mark.parametrize("router_layer", [6, 1000])
def test_a_router_layer_beyond_the_layers(refuse, loaded, router_layer):
    line = refuse("--model.router_layer", str(router_layer))
    assert f"model.router_layer: layer {router_layer}, but embedded has layers 0 to 5" in line


def test_the_run_folder_exists(place, refuse, no_base):
    (place / "runs/there").mkdir(parents=True)
    line = refuse("--name", "there")
    assert "runs/there: exists already" in line
    assert "--resume runs/there" in line


@pytest.mark.parametrize("runs_folder", ["taken", "taken/deeper"])
def test_a_file_in_the_way_of_the_runs(place, refuse, no_base, runs_folder):
    file(place, "x", "taken")
    line = refuse("--runs", runs_folder)
    assert f"{runs_folder}/quickstart: cannot be written" in line
    assert "--runs" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_place_for_the_runs(place, refuse, no_base):
    (place / "sealed").mkdir(mode=0o500)
    assert "cannot be written" in refuse("--runs", "sealed")


@pytest.fixture
def stopped(place) -> Path:
    """A run folder without a checkpoint."""
    folder = place / "runs/mine"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(SKILL)
    return folder


def test_resuming_a_finished_run(stopped, refuse, no_base):
    (stopped / "checkpoints/final").mkdir()
    assert "this run is finished, there is nothing to resume" in refuse("--resume", str(stopped))


def test_resuming_from_a_damaged_checkpoint(stopped, refuse, no_base):
    (stopped / "checkpoints/step-000002").mkdir()
    line = refuse("--resume", str(stopped))
    assert "step-000002/MANIFEST.json: missing or unreadable" in line


def test_resuming_a_folder_that_is_no_run(place, refuse, no_base):
    assert "no run here (no config.yaml)" in refuse("--resume", str(place))
    assert "no run here (no config.yaml)" in refuse("--resume", file(place, "x", "file"))
