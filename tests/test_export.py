"""The exporting tool: options that fit together, mistakes that write nothing, and uploads that never touch the network here."""

from __future__ import annotations

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from dylora_mlx import export
from dylora_mlx.cli.parser import run_command
from dylora_mlx.exporting.folder import CARD, MANIFEST, read_manifest

REPOSITORY = "someone/mixture"


@pytest.fixture
def call(finished, tmp_path, capsys):
    """A function that exports the finished run to tmp_path/out and returns the exit code, what was shown, and the error."""

    def run(*options: str) -> tuple[int, str, str]:
        code = run_command(export.command, [str(finished), "--out", str(tmp_path / "out"), *options])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def hub(monkeypatch):
    """Calls of the hub's two methods; put an exception into `fail` to make the first one raise it."""
    seen = SimpleNamespace(calls=[], fail=None)

    def create(self, repository, **options):
        seen.calls.append(("create", repository, options))
        if seen.fail:
            raise seen.fail

    def upload(self, **options):
        seen.calls.append(("upload", options["repo_id"], options))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    return seen


FITTING = [
    (["--format", "xlora", "--expert", "sql"], "--expert is for --format experts, gguf-lora and merged"),
    (["--format", "blend", "--weights", "sql=1", "--expert", "sql"], "--expert is for"),
    (["--weights", "sql=1"], "--weights is for --format blend and merged"),
    (["--format", "runtime", "--weights", "sql=1"], "--weights is for"),
    (["--top-k", "2"], "--top-k is for --format xlora and runtime"),
    (["--format", "merged", "--expert", "sql", "--top-k", "2"], "--top-k is for"),
    (["--refit-router"], "--refit-router is for"),
    (["--format", "xlora", "--dtype", "float32"], "--dtype is for --format gguf-lora and merged"),
    (["--format", "gguf-lora", "--weights", "sql=1"], "--weights is for --format blend and merged"),
    (["--format", "gguf-lora", "--top-k", "1"], "--top-k is for"),
    (["--format", "gguf-lora", "--dtype", "float16", "--verify"], "--verify compares float32 factors"),
    (["--format", "blend"], "--format blend needs --weights"),
    (["--format", "merged"], "needs either --expert or --weights"),
    (["--format", "merged", "--expert", "sql", "--weights", "sql=1"], "needs either --expert or --weights"),
    (["--public"], "are for --push"),
    (["--dry-run"], "are for --push"),
    (["--format", "xlora", "--top-k", "0"], "--top-k 0: a number of experts, or dense"),
    (["--format", "xlora", "--top-k", "-1"], "--top-k"),
    (["--format", "xlora", "--top-k", "²"], "--top-k ²"),
    (["--format", "xlora", "--top-k", "all"], "--top-k all"),
    (["--format", "gguf"], "invalid choice"),
]


@pytest.mark.parametrize(("options", "message"), FITTING)
def test_options_that_do_not_fit_together(call, tmp_path, options, message):
    code, _, error = call(*options)
    assert code == 2
    assert message in error
    assert list(tmp_path.iterdir()) == []


MISTAKES = [
    (["--expert", "cobol"], "no expert 'cobol' in this run, there are 1 (requests), 2 (sql)"),
    (["--format", "merged", "--expert", "3"], "no expert '3'"),
    (["--format", "gguf-lora", "--expert", "cobol"], "no expert 'cobol'"),
    (["--format", "blend", "--weights", "sql=0.5,cobol=0.5"], "no expert 'cobol'"),
    (["--format", "blend", "--weights", "sql=much"], "'sql=much' should be a name and a number"),
    (["--format", "blend", "--weights", "sql=1,2=1"], "two of sql, 2 are the same expert"),
    (["--format", "merged", "--weights", "sql=0"], "a weight other than 0"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_mistakes_write_nothing(call, tmp_path, options, message):
    code, _, error = call(*options)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_left_alone(call, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    code, _, error = call()
    assert (code, [path.name for path in (tmp_path / "out").iterdir()]) == (2, ["mine"])
    assert "exists already" in error


def test_a_run_that_is_none(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        arguments = [str(tmp_path / name), "--out", str(tmp_path / "out")]
        assert run_command(export.command, arguments) == 2
        assert "no run here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


FORMATS = [
    ([], {"expert_1/adapter_config.json", "expert_2/adapter_model.safetensors"}),
    (["--expert", "sql"], {"expert_2/adapter_config.json"}),
    (["--format", "gguf-lora"], {"expert_1.gguf", "expert_2.gguf"}),
    (["--format", "gguf-lora", "--expert", "sql", "--dtype", "float16"], {"expert_2.gguf"}),
    (
        ["--format", "xlora"],
        {"adapter_config.json", "0/adapter_config.json", "2/adapter_config.json", "dylora_torch.py"},
    ),
    (["--format", "xlora", "--refit-router"], {"adapter_config.json"}),
    (["--format", "runtime", "--top-k", "dense"], {"adapter_model.safetensors", "dylora_torch.py"}),
    (["--format", "blend", "--weights", "sql=0.7,requests=0.3"], {"adapter_config.json"}),
    (
        ["--format", "merged", "--weights", "sql=0.7,requests=0.3"],
        {"model.safetensors", "config.json", "tokenizer.json"},
    ),
]


@pytest.mark.parametrize(("options", "names"), FORMATS)
def test_every_format_is_a_whole_folder(call, tmp_path, options, names):
    code, shown, _ = call(*options)
    assert code == 0
    assert f"in {tmp_path / 'out'}:" in shown
    found = read_manifest(tmp_path / "out")
    there = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names < there
    assert there == {*found["sha256"], MANIFEST, CARD}
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_dry_run_lists_what_would_be_uploaded(call, hub, tmp_path):
    code, shown, _ = call("--format", "xlora", "--push", REPOSITORY, "--dry-run")
    assert (code, hub.calls) == (0, [])
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert f"would upload {sum(path.stat().st_size for path in files)} bytes to {REPOSITORY} (private):" in shown
    assert all(f"  {path.relative_to(tmp_path / 'out').as_posix()}  {path.stat().st_size}\n" in shown for path in files)
    assert {"README.md", MANIFEST} <= {path.name for path in files}


@pytest.mark.parametrize(("options", "private"), [([], True), (["--public"], False)])
def test_an_upload_is_private_unless_asked_otherwise(call, hub, tmp_path, options, private):
    code, shown, _ = call("--push", REPOSITORY, *options)
    assert code == 0
    assert f"uploaded to https://huggingface.co/{REPOSITORY}" in shown
    (first, name, created), (second, to, uploaded) = hub.calls
    assert (first, second, name, to) == ("create", "upload", REPOSITORY, REPOSITORY)
    assert created["private"] is private
    assert uploaded["folder_path"] == tmp_path / "out"


def refused(status: int) -> HfHubHTTPError:
    response = SimpleNamespace(headers={}, request=None, status_code=status)
    return HfHubHTTPError(f"{status}\nno", response=response)  # pyright: ignore[reportArgumentType]


FAILURES = [
    (LocalTokenNotFoundError("no token\nlog in"), ["no login on this machine", "hf auth login"]),
    (refused(401), ["the hub refuses (401)", "hf auth login"]),
    (refused(403), ["the hub refuses (403)", "a token that may write there"]),
    (refused(500), ["the hub answers 500"]),
    (HFValidationError("Repo id must\nbe"), ["not a repository name; give USER/NAME"]),
    (ConnectionError("no route\nto host"), ["cannot be reached (no route)", "is kept"]),
    (TimeoutError(), ["cannot be reached (TimeoutError)"]),
]


@pytest.mark.parametrize(("failure", "words"), FAILURES)
def test_an_upload_that_fails_is_one_line(call, hub, tmp_path, failure, words):
    hub.fail = failure
    code, _, error = call("--push", REPOSITORY)
    assert (code, error.count("\n"), len(hub.calls)) == (2, 1, 1)
    assert all(word in error for word in (f"error: --push {REPOSITORY}: ", *words)), error
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["kind"] == "experts"
