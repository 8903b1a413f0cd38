"""The doctor's findings, and that no token is ever shown."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest

from dylora_mlx import doctor


def findings(capsys) -> tuple[int, dict[str, dict]]:
    code = doctor.main(["--json"])
    lines = capsys.readouterr().out.splitlines()
    return code, {found["name"]: found for found in map(json.loads, lines)}


def test_a_machine_that_runs_the_tests_is_sound(capsys):
    code, found = findings(capsys)
    assert code == 0
    assert not [name for name, finding in found.items() if finding["state"] == "bad"]
    assert found["mlx"]["value"][0].isdigit()
    assert found["memory"]["value"].endswith("GiB")
    assert all(finding["remedy"] for finding in found.values() if finding["state"] != "good")


def test_what_is_missing_is_named_with_its_remedy(capsys, monkeypatch):
    def version(name: str) -> str:
        if name in ("datasets", "wandb", "peft"):
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor.blas, "describe", lambda: "MLX's own (slow)")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    code, found = findings(capsys)
    assert code == 1
    assert (found["datasets"]["state"], found["datasets"]["remedy"]) == ("bad", "pip install datasets")
    assert (found["wandb"]["state"], found["wandb"]["remedy"]) == ("remark", "pip install 'dylora-mlx[wandb]'")
    assert found["peft"]["state"] == "remark"
    assert found["disk here"]["state"] == "remark"
    if "BLAS" in found:
        assert found["BLAS"] | {"value": ""} == {
            "name": "BLAS",
            "value": "",
            "state": "bad",
            "remedy": "pip install mkl",
        }
    doctor.main([])
    shown = capsys.readouterr().out
    assert "datasets: pip install datasets" in shown
    assert "no problems found" not in shown


@pytest.mark.parametrize("there", [True, False])
def test_logins_are_told_without_their_tokens(capsys, monkeypatch, there, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret" if there else None)
    monkeypatch.setenv("WANDB_API_KEY", "wandb_secret" if there else "")
    _, found = findings(capsys)
    assert {found[name]["value"] for name in ("hub login", "W&B login")} == {"yes" if there else "no"}
    doctor.main([])
    assert "secret" not in json.dumps(found) + capsys.readouterr().out
