"""What a run keeps of its data: it goes on with these documents, compares the sources with them, and needs no source."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from transformers.utils import chat_template_utils

import dylora_mlx
from dylora_mlx import add, assets, estimate, evaluate, train
from dylora_mlx.data import kept
from dylora_mlx.errors import UserError
from dylora_mlx.exporting.refit_router import refit_router
from dylora_mlx.exporting.verify import verification_texts
from dylora_mlx.run import metadata, run_folder
from dylora_mlx.training.checkpoint import checkpoint
from tests.run import homes

TEMPLATE = (
    "{{ strftime_now('%d %b %Y') }}\n{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""A chat template that writes today's date."""
REFERENCE = ["def f(x):", "return x", "SELECT 1"]
CHATS = homes.CONFIG.replace("data: {", "data: {chat_template: date.jinja, ").replace(
    "policy:", "min_tokens: 100, policy:"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a project and its finished run."""
    folder = tmp_path_factory.mktemp("kept")
    homes.trained(homes.project(folder / "home"))
    return folder


@pytest.fixture
def copy(made, tmp_path) -> Path:
    """A copy of the project and the run, whose config names the copy's files."""
    shutil.copytree(made, tmp_path / "copy")
    path = tmp_path / "copy/run/config.yaml"
    path.write_text(path.read_text().replace(str(made), str(tmp_path / "copy")))
    return tmp_path / "copy"


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    """No source was ever tokenized."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def refusal(capsys, main, *argv: str) -> str:
    """Return the error line of a command that must be refused."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    return line


def test_the_documents_of_every_source_are_kept(made):
    assert sorted(path.name for path in (made / "run/data").iterdir()) == ["digits.npz", "letters.npz", "other.npz"]
    run = run_folder.open_run(made / "run")
    texts = [json.loads(line)["text"] for line in (made / "home/data/letters.jsonl").read_text().splitlines()]
    documents = kept.read(made / "run/data/letters.npz", run.base.args.vocab_size).documents
    decoded = [
        run.base.tokenizer.decode(document.tokens[1:-1].tolist())
        for split in documents.splits.values()
        for document in split
    ]
    assert sorted(decoded) == sorted(texts)
    assert [len(documents.splits[name]) for name in ("train", "validation", "test")] == [38, 5, 5]
    assert all(document.tokens[0] == 2 and document.tokens[-1] == 1 for document in documents.splits["train"])


def test_digests_are_those_of_the_records(made):
    digests = homes.digests(made / "run")
    assert digests.keys() == {"letters", "digits", "other"}
    for name, digest in digests.items():
        assert digest == f"records:{kept.read(made / f'run/data/{name}.npz', 10**6).documents.digest}"


def test_the_base_skill_is_kept_too(tmp_path):
    text = homes.CONFIG.replace("base_skill: null", "base_skill: {name: known, source: data/signs.jsonl}").replace(
        "domains: [{name: other, source: data/signs.jsonl}]\n", ""
    )
    run = homes.trained(homes.project(tmp_path / "home", text))
    assert sorted(path.name for path in (run / "data").iterdir()) == ["digits.npz", "known.npz", "letters.npz"]


@pytest.mark.parametrize("at", ["step-000000", "step-000003", "step-000004", "step-000007"])
def test_a_resumed_run_needs_no_source(copy, capsys, at):
    """It ends with the same bits, and says once that they are gone."""
    interrupted = homes.interrupt(copy / "run", copy / "interrupted", at)
    shutil.rmtree(copy / "home/data")
    assert train.main(["--resume", str(interrupted), "--quiet"]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    places = ", ".join(f"{copy}/home/data/{name}.jsonl" for name in ("letters", "digits", "signs"))
    assert warnings == [f"warning: {places}: gone; the documents that the run kept are used"]
    assert homes.same_bits(interrupted, copy / "run")


def test_evaluate_estimate_and_exports_need_no_source(copy, made, capsys):
    (copy / "home/data/digits.jsonl").unlink()
    losses = dylora_mlx.load(copy / "run").losses()
    assert losses == dylora_mlx.load(made / "run").losses()
    assert "digits.jsonl: gone; the documents that the run kept are used" in capsys.readouterr().err
    ours, theirs = run_folder.open_run(copy / "run"), run_folder.open_run(made / "run")
    for one, other in zip(verification_texts(ours), verification_texts(theirs), strict=True):
        assert (one == other).all()
    assert refit_router(ours).same == refit_router(theirs).same
    assert estimate.main([str(copy / "run"), "--quiet"]) == 0


def test_a_run_learns_more_without_its_sources(copy, made, capsys):
    shutil.copy(copy / "home/data/signs.jsonl", copy / "new.jsonl")
    shutil.rmtree(copy / "home/data")
    assert add.main([str(copy / "run"), str(copy / "new.jsonl"), "--name", "new", "--quiet"]) == 0
    assert "gone" in capsys.readouterr().err
    assert homes.digests(copy / "run").keys() == {"letters", "digits", "other", "new"}
    assert (copy / "run/data/new.npz").is_file()


def commands(copy: Path) -> list:
    return [
        (evaluate.main, [copy / "run"]),
        (add.main, [copy / "run", copy / "home/data/signs.jsonl", "--name", "new"]),
        (estimate.main, [copy / "run"]),
    ]


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("name", ["letters", "digits", "signs"])
def test_other_records_are_refused_by_name(copy, capsys, number, name):
    homes.change_record(copy / f"home/data/{name}.jsonl")
    main, argv = commands(copy)[number]
    before = {path: path.read_bytes() for path in (copy / "run").rglob("*") if path.is_file()}
    line = refusal(capsys, main, *argv)
    skill = "other" if name == "signs" else name
    assert line == (
        f"error: {copy}/run was trained on other records of '{skill}' than {copy}/home/data/{name}.jsonl has now; put the old "
        "ones back, or move it away: the run kept what it learned from"
    )
    assert {path: path.read_bytes() for path in (copy / "run").rglob("*") if path.is_file()} == before


def test_the_refit_and_the_check_of_an_export_refuse_them_too(copy):
    homes.change_record(copy / "home/data/letters.jsonl")
    run = run_folder.open_run(copy / "run")
    for work in (refit_router, verification_texts):
        with pytest.raises(UserError, match="was trained on other records of 'letters'"):
            work(run)


def test_a_resume_refuses_other_records(copy, capsys):
    interrupted = homes.interrupt(copy / "run", copy / "interrupted")
    homes.change_record(copy / "home/data/digits.jsonl")
    line = refusal(capsys, train.main, "--resume", interrupted)
    assert line == (
        f"error: {copy}/home/data/digits.jsonl: the data of 'digits' changed since the run began; put it back to resume, or "
        "move it away: the run kept what it learned from"
    )
    (copy / "home/data/digits.jsonl").unlink()
    assert train.main(["--resume", str(interrupted), "--quiet"]) == 0
    assert homes.same_bits(interrupted, copy / "run")


@pytest.mark.parametrize("change", [
    lambda text: text + "\n\n", lambda text: "\n".join(json.dumps(json.loads(t), indent=None) for t in text.splitlines()),
    lambda text: text.replace('{"text": ', '{  "text":'), lambda text: "\ufeff" + text,
])  # fmt: skip
def test_the_same_records_written_otherwise_are_accepted(copy, change):
    path = copy / "home/data/letters.jsonl"
    path.write_text(change(path.read_text()), encoding="utf-8")
    assert evaluate.main([str(copy / "run")]) == 0


def test_another_text_under_a_packaged_name_uses_what_was_kept(tmp_path, monkeypatch, capsys):
    """Nobody can put it back: a later version of the package has it."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        (folder / "mine").mkdir(parents=True)
        for split, count in {"train": 40, "validation": 4, "test": 4}.items():
            lines = (homes.STORED / "data/signs.jsonl").read_text().splitlines()[:count]
            (folder / f"mine/{split}.jsonl").write_text("\n".join(lines[folder == second :]) + "\n")
    monkeypatch.setattr(assets, "SKILLS", first)
    run = homes.trained(homes.project(tmp_path / "home", homes.CONFIG.replace("data/signs.jsonl", "packaged/mine")))
    losses = dylora_mlx.load(run).losses()
    capsys.readouterr()
    monkeypatch.setattr(assets, "SKILLS", second)
    assert dylora_mlx.load(run).losses() == losses
    assert capsys.readouterr().err.split("warning: ")[1:] == [
        "packaged/mine: other records now than those that the run learned; the documents that it kept are used\n"
    ]


def test_a_data_set_of_the_hub(tmp_path, monkeypatch, capsys):
    """Unreachable, the kept documents are used; changed, they are used too, with a warning: nobody can put it back."""
    texts = [json.loads(line)["text"] for line in (homes.STORED / "data/signs.jsonl").read_text().splitlines()]
    answers = {"first": texts, "second": texts[:-1]}
    state = {"serves": "first"}

    def load_dataset(*_):
        if state["serves"] not in answers:
            raise ConnectionError("no route to the hub")
        rows = datasets.Dataset.from_list([{"text": text} for text in answers[state["serves"]]])
        return datasets.DatasetDict({"train": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    run = homes.trained(homes.project(tmp_path / "home", homes.CONFIG.replace("data/signs.jsonl", "owner/set")))
    losses = dylora_mlx.load(run).losses()
    interrupted = homes.interrupt(run, tmp_path / "interrupted")
    capsys.readouterr()
    for serves, words in (
        ("second", "other records now than those"),
        ("nothing", "gone; the documents that the run kept"),
    ):
        state["serves"] = serves
        assert dylora_mlx.load(run).losses() == losses
        (warning,) = capsys.readouterr().err.splitlines()
        assert warning.startswith(f"warning: owner/set: {words}")
    assert train.main(["--resume", str(interrupted), "--quiet"]) == 0
    assert homes.same_bits(interrupted, run)


def set_today(monkeypatch, day: int) -> None:
    """Set the date that chat templates write."""

    class Today(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2031, 5, day)

    monkeypatch.setattr(chat_template_utils, "datetime", Today)


def test_a_template_that_writes_the_date(tmp_path, fresh_cache, monkeypatch):
    """The run goes on with what it rendered when it began."""
    monkeypatch.setattr(assets, "reference_text", lambda: REFERENCE)  # short, as every cache here begins empty
    set_today(monkeypatch, 1)
    home = homes.project(tmp_path / "home", CHATS)
    (home / "date.jinja").write_text(TEMPLATE)
    for name in ("letters", "digits", "signs"):
        path = home / f"data/{name}.jsonl"
        texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        chats = [[{"role": "user", "content": t[:20]}, {"role": "assistant", "content": t[20:]}] for t in texts]
        path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    run = homes.trained(home)
    for number, at in enumerate(["", "step-000000", "step-000002", "step-000006"]):
        set_today(monkeypatch, 2 + number)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache-{number}"))
        interrupted = homes.interrupt(run, tmp_path / f"interrupted-{number}", at)
        assert train.main(["--resume", str(interrupted), "--quiet"]) == 0
        assert homes.same_bits(interrupted, run)
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["chat_template"] == TEMPLATE
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "last"))
    set_today(monkeypatch, 9)
    losses, stored = dylora_mlx.load(run).losses(), json.loads((run / "results.json").read_text())["test"]
    assert {n: v.base for n, v in losses.items()} == pytest.approx({n: v["base"] for n, v in stored.items()}, abs=1e-4)
    other = homes.trained(home, "other")  # a run that begins today
    kept_texts = [
        run_folder.open_run(r).base.tokenizer.decode(
            kept.read(r / "data/letters.npz", 10**6).documents.splits["train"][0].tokens
        )
        for r in (run, other)
    ]
    assert [text[:11] for text in kept_texts] == ["01 May 2031", "09 May 2031"]
    assert kept_texts[0][11:] == kept_texts[1][11:]
    assert homes.digests(run) == homes.digests(other)


def test_before_the_first_checkpoint_a_source_may_change(copy):
    """Nothing was learned from it yet."""
    interrupted = homes.interrupt(copy / "run", copy / "interrupted", "")
    homes.change_record(copy / "home/data/letters.jsonl")
    assert train.main(["--resume", str(interrupted), "--quiet"]) == 0
    assert homes.digests(interrupted)["letters"] != homes.digests(copy / "run")["letters"]
    assert homes.digests(interrupted)["digits"] == homes.digests(copy / "run")["digits"]
    assert evaluate.main([str(interrupted)]) == 0


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("text"),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "token": lambda path: rewrite(path, train_tokens=lambda a: np.where(np.arange(len(a)) == 5, 10**6, a).astype(np.int32)),
    "negative": lambda path: rewrite(path, train_tokens=lambda a: -a),
    "ends": lambda path: rewrite(path, train_ends=lambda a: a + 1),
    "format": lambda path: rewrite(path, run=lambda a: np.array(str(a).replace("plain", "song"))),
    "options": lambda path: rewrite(path, run=lambda a: np.array("[]")),
    "no split": lambda path: rewrite(path, **dict.fromkeys(("test_tokens", "test_loss_mask", "test_ends"), lambda a: a[:0])),
    "pickle": lambda path: rewrite(path, info=lambda a: np.array({"a": 1}, dtype=object)),
    "packed": lambda path: rewrite(path, save=np.savez_compressed),
}  # fmt: skip


def rewrite(path: Path, save=np.savez, **changes) -> None:
    """Write a file of kept documents again with some arrays changed."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file}
    save(path, **{name: changes.get(name, lambda a: a)(array) for name, array in arrays.items()})


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_documents_are_read_from_the_source_again(copy, made, capsys, damage):
    path = copy / "run/data/letters.npz"
    damage(path)
    assert dylora_mlx.load(copy / "run").losses() == dylora_mlx.load(made / "run").losses()
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {path}: ")
    assert warning.endswith(f"; {copy}/home/data/letters.jsonl was read again")


@pytest.mark.parametrize("damage", ["cut", "token"])
def test_without_the_source_they_are_one_line(copy, capsys, damage):
    path = copy / "run/data/letters.npz"
    DAMAGE[damage](path)
    shutil.rmtree(copy / "home/data")
    for main, argv in commands(copy)[::2]:
        line = refusal(capsys, main, *argv)
        assert line.startswith(f"error: {path}: damaged (")
        assert line.endswith(f", and {copy}/home/data/letters.jsonl is gone; put one of them back")


def test_a_resume_writes_them_anew(copy, made):
    interrupted = homes.interrupt(copy / "run", copy / "interrupted")
    DAMAGE["cut"](interrupted / "data/letters.npz")
    (interrupted / "data/digits.npz").unlink()
    (interrupted / "data/.digits.123.partial.npz").touch()
    assert train.main(["--resume", str(interrupted), "--quiet"]) == 0
    assert homes.same_bits(interrupted, made / "run")
    for name in ("letters", "digits", "other"):
        assert (interrupted / f"data/{name}.npz").read_bytes() == (made / f"run/data/{name}.npz").read_bytes()
    assert len(list((interrupted / "data").iterdir())) == 3


def test_documents_of_another_run_are_not_taken(copy, made, capsys):
    shutil.copy(copy / "run/data/digits.npz", copy / "run/data/letters.npz")
    assert dylora_mlx.load(copy / "run").losses() == dylora_mlx.load(made / "run").losses()
    assert "letters.npz: other documents than the run learned; " in capsys.readouterr().err


@pytest.mark.parametrize(("old", "new", "name"), [
    ("  text: null", "  text: 'x {text}'", "text"), ("  limit: null", "  limit: 40", "limit"),
    ("  validation_fraction: 0.1", "  validation_fraction: 0.2", "data.validation_fraction"), ("\nseed: 0", "\nseed: 1", "seed"),
    ("  chat_template: null", "  chat_template: chatml", "data.chat_template"),
])  # fmt: skip
def test_options_that_the_documents_depend_on_may_not_change(copy, capsys, old, new, name):
    interrupted = homes.interrupt(copy / "run", copy / "interrupted")
    for run, main, argv in ((interrupted, train.main, ["--resume", interrupted]), (copy / "run", *commands(copy)[0])):
        path = run / "config.yaml"
        assert path.read_text().count(old)
        path.write_text(path.read_text().replace(old, new, 1))
        line = refusal(capsys, main, *argv)
        assert line == (
            f"error: {run}/config.yaml: {name} of 'letters' changed since the run began; put the old values back"
        )


def test_the_length_of_rows_counts_where_documents_are_cut(copy, capsys):
    interrupted = homes.interrupt(copy / "run", copy / "interrupted")
    path = interrupted / "config.yaml"
    path.write_text(path.read_text().replace("max_seq_length: 64", "max_seq_length: 32"))
    line = refusal(capsys, train.main, "--resume", interrupted)
    assert "config.yaml: data.max_seq_length of 'letters' changed since the run began" in line
    path.write_text(path.read_text().replace("max_seq_length: 32", "max_seq_length: 48"))  # no document is longer
    assert train.main(["--resume", str(interrupted), "--quiet"]) == 0


def test_other_options_may_change(copy):
    path = copy / "run/config.yaml"
    path.write_text(
        path.read_text().replace("rank: null", "rank: 2").replace("packing_window: 256", "packing_window: 9")
    )
    assert evaluate.main([str(copy / "run")]) == 0


def test_a_name_that_was_tried_before(copy, capsys):
    """`add` was stopped after it kept the documents; the next one teaches something else under that name."""
    shutil.copy(copy / "run/data/digits.npz", copy / "run/data/new.npz")
    assert add.main([str(copy / "run"), str(copy / "home/data/signs.jsonl"), "--name", "new", "--quiet"]) == 0
    digest = kept.read(copy / "run/data/new.npz", 10**6).documents.digest
    assert digest == kept.read(copy / "run/data/other.npz", 10**6).documents.digest
    assert homes.digests(copy / "run")["new"] == f"records:{digest}"


def test_a_failed_add_leaves_no_documents(copy, monkeypatch):
    before = sorted((copy / "run").rglob("*"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    assert add.main([str(copy / "run"), str(copy / "home/data/signs.jsonl"), "--name", "new", "--quiet"]) == 1
    assert sorted((copy / "run").rglob("*")) == before


def test_a_run_of_version_0_1_0(copy, made, capsys):
    """Digests of tokens, no kept documents: as it was, and from the next resume on as any other."""
    tokens = {
        skill.name: skill.token_digest
        for skill in run_folder.open_run(made / "run").read_sources(
            [*run_folder.open_run(made / "run").config.skills, *run_folder.open_run(made / "run").config.domains]
        )
    }
    interrupted = homes.interrupt(copy / "run", copy / "interrupted")
    for run in (copy / "run", interrupted):
        shutil.rmtree(run / "data")
        homes.edit_trainer(run, data_digests=tokens)
    assert dylora_mlx.load(copy / "run").losses() == dylora_mlx.load(made / "run").losses()
    assert not (copy / "run/data").exists()
    assert train.main(["--resume", str(interrupted), "--quiet"]) == 0
    assert homes.same_bits(interrupted, made / "run")
    assert homes.digests(interrupted) == homes.digests(made / "run")
    assert (interrupted / "data/letters.npz").read_bytes() == (made / "run/data/letters.npz").read_bytes()
    homes.change_record(copy / "home/data/letters.jsonl")
    assert "was trained on other records of 'letters'" in refusal(capsys, evaluate.main, copy / "run")
    (copy / "home/data/letters.jsonl").unlink()
    assert refusal(capsys, evaluate.main, copy / "run") == (
        f"error: {copy}/home/data/letters.jsonl: no such file or folder (skill 'letters')"
    )


def test_prompts_of_version_0_1_0_may_be_rendered_otherwise(copy, capsys):
    """Its digests of tokens do not say whether the records changed."""
    home = homes.project(copy / "chats")
    for name in ("letters", "digits", "signs"):
        path = home / f"data/{name}.jsonl"
        texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({"prompt": t[:20], "completion": t[20:]}) + "\n" for t in texts))
    run = homes.trained(home, "prompts")
    interrupted = homes.interrupt(run, copy / "interrupted")
    old = {**homes.digests(run), "letters": "0" * 64}
    for folder in (run, interrupted):
        shutil.rmtree(folder / "data")
        homes.edit_trainer(folder, data_digests=old)
    capsys.readouterr()
    assert evaluate.main([str(run)]) == 0
    expected = (
        f"{copy}/chats/data/letters.jsonl: other tokens of 'letters' than version 0.1.0 of dylora_mlx learned: the records "
        "changed, or this version renders them in another way"
    )
    assert capsys.readouterr().err == f"warning: {expected}\n"
    line = refusal(capsys, train.main, "--resume", interrupted)
    assert line == f"error: {expected}; finish the run with that version"


def test_the_estimate_counts_the_documents(made):
    run, resources = run_folder.reopen_finished(made / "run")
    stored = metadata.folder_size(made / "run/data")
    assert run.sources.num_bytes == pytest.approx(stored, rel=0.1)
    assert resources["disk"] > stored
