"""A GGUF file as the base of a run: it learns, generates and exports, under the file's own name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

import dylora_mlx
from dylora_mlx import export, generate, train
from dylora_mlx.errors import UserError
from dylora_mlx.model.base.load import locate_base
from dylora_mlx.run import run_folder
from tests.gguf_files import Q, write_gguf

CONFIG = """
skills:
  - {name: sql, source: SKILLS/sql}
growth: {base_skill: null, min_samples: 8, min_tokens: 100, top_k: 1, dense_steps: 1, anneal_steps: 1}
data: {max_seq_length: 128}
model: {base: models/tiny.gguf, dtype: float32}
training: {max_steps: 6, steps_per_eval: 100, save_every: 100, memory_tokens: 256, learning_rate: 0.02}
"""


def placed(folder: Path, kind: Q) -> Path:
    """Write a GGUF base."""
    return write_gguf(folder, "llama", (kind,)).path


@pytest.fixture(scope="module")
def run(tmp_path_factory, short_skills) -> Path:
    """A finished run of one skill, whose config names the base relative to itself."""
    home = tmp_path_factory.mktemp("gguf")
    (home / "models").mkdir()
    placed(home / "models" / "tiny.gguf", Q.Q8_0)
    (home / "config.yaml").write_text(CONFIG.replace("SKILLS", str(short_skills)))
    assert train.main(["--config", str(home / "config.yaml"), "--runs", str(home), "--name", "run"]) == 0
    return home / "run"


def test_a_run_keeps_the_files_name(run):
    path = str(run.parent / "models" / "tiny.gguf")
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["base"] == path
    assert json.loads((run / "run.json").read_text())["base"] == path
    opened = dylora_mlx.load(str(run))
    result = opened.losses()
    assert result["sql"].mixture < result["sql"].base - 0.1
    assert path in opened._repr_html_()


def test_a_run_generates(run, capsys):
    assert generate.main([str(run), "--prompt", "SELECT", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out


def test_exports_name_the_folder_that_others_can_load(run, tmp_path):
    assert export.main([str(run), "--out", str(tmp_path / "peft")]) == 0
    config = json.loads((tmp_path / "peft/expert_1/adapter_config.json").read_text())
    folder = Path(config["base_model_name_or_path"])
    assert folder == locate_base(str(run.parent / "models" / "tiny.gguf"))
    assert (folder / "model.safetensors").is_file()
    assert export.main([str(run), "--format", "merged", "--expert", "sql", "--out", str(tmp_path / "full")]) == 0
    assert (tmp_path / "full/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_another_quantisation_is_another_base(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    other = placed(tmp_path / "tiny.gguf", Q.Q4_0)
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace(str(run.parent / "models" / "tiny.gguf"), str(other)))
    with pytest.raises(UserError, match=r"made with another base than .*tiny.gguf"):
        run_folder.open_run(copy)


def test_a_file_that_is_gone(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("models/tiny.gguf", "models/gone.gguf"))
    with pytest.raises(UserError, match=r"gone.gguf: no such file; check the path"):
        run_folder.open_run(copy)


@pytest.mark.export
def test_pytorch_computes_the_same(run, tmp_path, capsys):
    for options in (["--format", "experts"], ["--format", "gguf-lora"], ["--format", "merged", "--expert", "sql"]):
        assert export.command([str(run), *options, "--out", str(tmp_path / options[1]), "--verify"]) == 0
        assert "ok" in capsys.readouterr().out
