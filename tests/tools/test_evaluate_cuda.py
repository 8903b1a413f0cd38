"""tools/benchmarks/evaluate_cuda.py on a CPU: the losses are MLX's, and what cannot be read is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from dylora_mlx.cli.parser import run_command
from dylora_mlx.data import packing, stream
from dylora_mlx.data.formatting import Document
from dylora_mlx.data.stream import Split
from dylora_mlx.exporting import formats
from dylora_mlx.exporting.write import open_for_export
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.training.step.evaluate import evaluate, make_domains
from tests.conftest import FEW
from tests.exporting.mixtures import change_arrays, change_json, export, tool

pytestmark = pytest.mark.export
LENGTH, LIMIT = 150, 3


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    """The shared run, as if it had learned from the packaged skills themselves: an export can name those."""
    copy = tmp_path_factory.mktemp("packaged") / "run"
    shutil.copytree(finished, copy)
    text = (copy / "config.yaml").read_text().replace(f"{FEW}/", "packaged/")
    (copy / "config.yaml").write_text(text)
    return open_for_export(copy, "float32")


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory) -> Path:
    return export(run, tmp_path_factory.mktemp("cuda") / "folder")


@pytest.fixture
def cuda():
    return tool("evaluate_cuda")


def line(folder: Path, *options: str) -> list[str]:
    return [str(folder), "--device", "cpu", "--limit", str(LIMIT), "--length", str(LENGTH), "--batch", "2", *options]


def test_losses_are_mlxs(run, folder, cuda, tmp_path, monkeypatch, capsys):
    from torch_evaluation import generation

    monkeypatch.setattr(generation, "REPEATS", 1)
    monkeypatch.setattr(generation, "PROMPTS", 2)
    assert cuda.command(line(folder, "--json", str(tmp_path / "found.json"), "--generate", "8")) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["texts"]) == ["python", "requests", "sql", "requests_more"]
    how = formats.mixture_routing(run)
    routed, alone = Routing(how.top_k, mx.array(how.temperature)), Routing(None, mx.array(1.0))
    for source in (run.config.growth.base_skill, *run.config.skills):
        skill = stream.prepare_skill(source, run.config.data, run.base.tokenizer, run.config.seed)
        texts = cuda.documents(source, run.base.tokenizer, cuda.parse(line(folder)))
        assert len(texts) == LIMIT
        for (tokens, _), piece in zip(texts, skill.test.segments, strict=False):  # the run's own test texts
            assert tokens[:40].tolist() == piece.tokens[:40].tolist()
        pieces = packing.split_documents([Document(*text) for text in texts], 512)
        domain = make_domains({source.name: Split(pieces, LIMIT)}, 512, 1)[source.name]
        row = found["texts"][source.name]
        assert set(row) == {"mixture", "base", "requests", "sql"}
        expected = {
            name: evaluate(run.model, domain, alone, c).loss for c, name in enumerate(formats.expert_names(run.pool))
        }
        expected["mixture"] = evaluate(run.model, domain, routed).loss
        for name, measured in row.items():
            assert abs(measured["nats"] - expected[name]) < 1e-3
            assert measured["speed"] > 0
    ways = found["generated"]
    assert list(ways) == ["the runtime", "the runtime, no caches", "PEFT's X-LoRA"]
    assert all((way["same"], way["prompts"]) == (2, 2) for way in ways.values())
    assert "8 tokens, greedily" in capsys.readouterr().out


def test_what_is_gone_is_named_and_left_out(folder, cuda, tmp_path, capsys):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    own = tmp_path / "mine.jsonl"
    own.write_text("".join(json.dumps({"text": f"SELECT {i} FROM t"}) + "\n" for i in range(30)))

    def gone(manifest) -> None:
        manifest["base_skill"], manifest["sources"] = None, manifest["sources"][1:2]
        manifest["sources"][0]["source"] = "gone.jsonl"

    change_json(copy, "dylora.json", gone)
    with pytest.raises(Exception, match="no domain's text could be read; give some with --data NAME=SOURCE"):
        cuda.command(line(copy))
    assert cuda.command(line(copy, "--data", f"mine={own}", "--json", str(tmp_path / "found.json"))) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "sql is left out: gone.jsonl: no such file" in shown
    assert "say where it is with --data sql=FILE" in shown
    assert list(json.loads((tmp_path / "found.json").read_text())["texts"]) == ["mine"]
    known = cuda.domains(cuda.parse(line(copy, "--data", f"sql={own}")))
    assert [(source.source, source.limit) for source in known] == [(str(own), 40)]  # the rest as the run had it
    assert cuda.command(line(copy, "--data", f"sql={own}", "--json", str(tmp_path / "found.json"))) == 0
    assert list(json.loads((tmp_path / "found.json").read_text())["texts"]) == ["sql"]


def damaged(folder: Path) -> None:
    change_arrays(folder, "1/adapter_model.safetensors", lambda arrays: arrays.pop(next(iter(arrays))))


MISTAKES = {
    "no-folder": (lambda f: shutil.rmtree(f), [], "dylora_torch.py: missing; give a folder that"),
    "damaged": (damaged, [], "1/adapter_model.safetensors: 'base_model"),
    "data": (lambda f: None, ["--data", "sql"], "--data sql: should be NAME=SOURCE"),
    "base": (lambda f: None, ["--base", "/no/base"], "/no/base: no such base on this machine"),
    "device": (lambda f: None, ["--device", "cuda"], "--device cuda: there is none here"),
    "limit": (lambda f: None, ["--limit", "0"], "--limit must be at least 1"),
    "generate": (lambda f: None, ["--generate", "-1"], "--generate must be at least 0"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_one_line(folder, cuda, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    copy, (change, options, message) = Path(shutil.copytree(folder, tmp_path / "copy")), MISTAKES[kind]
    change(copy)
    assert run_command(cuda.command, [*line(copy), *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_without_a_device_it_is_the_cpu_and_says_so(folder, cuda, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    _, model, _ = cuda.load(cuda.parse([str(folder)]))
    assert (model.device.type, str(model.dtype)) == ("cpu", "torch.float32")
    assert "no CUDA device here: on the CPU, in float32" in capsys.readouterr().out
