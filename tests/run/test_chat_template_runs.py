"""Runs with a chat template of their own: it is kept as text, used by everything that opens the run, and named by `explain`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

import dylora_mlx
from dylora_mlx import explain, export, generate, import_run, train
from dylora_mlx.data import kept, rendering
from dylora_mlx.run import run_folder
from tests.run import homes

TEXT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def chats(home: Path, *names: str) -> None:
    """Turn the texts of these files into chats, with the first 20 characters asked."""
    for name in names:
        path = home / f"data/{name}.jsonl"
        texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        turns = [[{"role": "user", "content": t[:20]}, {"role": "assistant", "content": t[20:]}] for t in texts]
        path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in turns))


def run_with(folder: Path, template: str | None) -> Path:
    """Train a skill of chats and one of plain text, with this value of data.chat_template."""
    text = homes.CONFIG if template is None else homes.CONFIG.replace("data: {", f"data: {{chat_template: {template}, ")
    home = homes.project(folder / "home", text.replace("policy:", "min_tokens: 100, policy:"))
    chats(home, "letters")
    (home / "mine.jinja").write_text(TEXT)
    return homes.trained(home)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run with the template of a file that is gone."""
    run = run_with(tmp_path_factory.mktemp("file"), "mine.jinja")
    (run.parent / "home/mine.jinja").unlink()
    return run


def explained(capsys, *argv: object) -> str:
    capsys.readouterr()
    assert explain.main([str(word) for word in argv]) == 0
    return capsys.readouterr().out


def test_a_file_is_kept_as_its_text(made):
    assert yaml.safe_load((made / "config.yaml").read_text())["data"]["chat_template"] == TEXT
    opened = run_folder.open_run(made)
    assert opened.base.tokenizer.chat_template == TEXT
    assert opened.library.find("letters").format == f"chat:{rendering.template_hash(TEXT)}"
    assert opened.library.find("digits").format == "plain"


def test_a_document_is_what_the_template_writes(made):
    tokenizer = run_folder.open_run(made).base.tokenizer
    document = kept.read(made / "data/letters.npz", 10**6).documents.splits["train"][0]
    text = tokenizer.decode(document.tokens.tolist())
    record = next(
        json.loads(line)["messages"]
        for line in (made.parent / "home/data/letters.jsonl").read_text().splitlines()
        if json.loads(line)["messages"][0]["content"] in text
    )
    answer = f"{record[1]['content']}<end><eos>"
    assert text == f"<user>{record[0]['content']}<end>\n<assistant>{answer}"
    assert tokenizer.decode(document.tokens[document.loss_mask].tolist()) == answer


def test_everything_that_opens_the_run_uses_it(made, tmp_path, capsys):
    assert generate.main([str(made), "--prompt", "abab", "--max-tokens", "2"]) == 0
    interrupted = homes.interrupt(made, tmp_path / "interrupted")
    assert train.main(["--resume", str(interrupted), "--quiet"]) == 0
    assert homes.same_bits(interrupted, made)
    assert dylora_mlx.load(made).losses().keys() == {"letters", "digits", "other"}


@pytest.mark.parametrize("kind", ["xlora", "runtime"])
def test_an_imported_mixture_has_it_too(made, tmp_path, kind):
    options = ["--refit-router"] if kind == "xlora" else []
    assert export.main([str(made), "--format", kind, "--out", str(tmp_path / "out"), "--top-k", "2", *options]) == 0
    argv = [str(tmp_path / "out"), "--name", "again", "--runs", str(tmp_path)]
    texts = [f"--text={name}={made.parent}/home/data/{name}.jsonl" for name in ("letters", "digits")]
    assert import_run.main([*argv, *texts]) == 0
    again = run_folder.open_run(tmp_path / "again")
    assert again.config.data.chat_template == TEXT
    assert again.library.find("letters").format == f"chat:{rendering.template_hash(TEXT)}"
    assert sorted(path.name for path in (tmp_path / "again/data").iterdir()) == ["digits.npz", "letters.npz"]
    ours, theirs = (kept.read(run / "data/letters.npz", 10**6).documents for run in (tmp_path / "again", made))
    assert ours.digest == theirs.digest
    for one, other in zip(ours.splits["train"], theirs.splits["train"], strict=True):
        assert (one.tokens == other.tokens).all()
        assert (one.loss_mask == other.loss_mask).all()
    assert dylora_mlx.load(tmp_path / "again").losses().keys() == {"letters", "digits"}


FORMS = [
    ("mine.jinja", "chats in the template of data.chat_template"),
    ("chatml", "chats in the chatml template that comes with the package"),
    (None, "chats in the gemma template that comes with the package"),
]


@pytest.mark.parametrize(("template", "words"), FORMS)
def test_explain_says_how_each_skill_was_learned(tmp_path, capsys, template, words):
    run = run_with(tmp_path, template)
    text = explained(capsys, run)
    assert f"Learned as {words}: letters.\nLearned as plain text: digits.\n" in text
    assert f"Its records were read as {words}.\n" in explained(capsys, run, "letters")
    assert "Its records were read as plain text.\n" in explained(capsys, run, "digits")
    stored = yaml.safe_load((run / "config.yaml").read_text())["data"]["chat_template"]
    assert stored == (TEXT if template == "mine.jinja" else template)


def test_explain_names_the_bases_own_template(tmp_path, capsys):
    home = homes.project(tmp_path / "home", homes.CONFIG.replace("policy:", "min_tokens: 100, policy:"))
    (home / "base/chat_template.jinja").write_text(TEXT)
    chats(home, "letters")
    text = explained(capsys, homes.trained(home))
    assert "Learned as chats in the base's own template: letters.\n" in text


def test_explain_of_an_unfinished_run(made, tmp_path, capsys):
    interrupted = homes.interrupt(made, tmp_path / "interrupted")
    assert "template of data.chat_template: letters.\n" in explained(capsys, interrupted)
    assert "digits." not in explained(capsys, interrupted).partition("Learned as")[2]  # not learned yet


@pytest.mark.parametrize("damage", ["missing", "text", "list", "entries", "no format", "other format"])
def test_explain_without_the_forms(made, tmp_path, capsys, damage):
    shutil.copytree(made, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/data")
    for path in (tmp_path / "run/checkpoints").glob("*/pool.json"):
        content = json.loads(path.read_text())
        entries = content["library"]["entries"]
        changed = {
            "text": "{", "list": "[]", "entries": json.dumps(content | {"library": {"entries": 3}}),
            "no format": json.dumps(content | {"library": {"entries": [{"skill": entry["skill"]} for entry in entries]}}),
            "other format": json.dumps(content | {"library": {"entries": [{**entry, "format": "song"} for entry in entries]}}),
        }  # fmt: skip
        path.unlink()
        if damage != "missing":
            path.write_text(changed[damage])
    text = explained(capsys, tmp_path / "run")
    assert "letters got an expert of its own" in " ".join(text.split())
    assert "Learned as" not in text
