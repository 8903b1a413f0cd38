"""tools/benchmarks/evaluate_cuda.py on a CPU: its losses equal MLX's, and unreadable sources are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from dylora_mlx.cli.parser import run_command
from dylora_mlx.data import packing, stream
from dylora_mlx.data.encoding import Document
from dylora_mlx.data.stream import Split
from dylora_mlx.exporting import formats
from dylora_mlx.exporting.write import open_for_export
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.training.step.domains import make_domains
from dylora_mlx.training.step.evaluate import evaluate
from tests.conftest import FEW
from tests.exporting.mixtures import change_arrays, change_json, export, tool

pytestmark = pytest.mark.export
LENGTH, LIMIT = 150, 3


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    """The shared run with its sources renamed to the packaged skills, which an export can name."""
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


def arguments(folder: Path, *options: str) -> list[str]:
    return [str(folder), "--device", "cpu", "--limit", str(LIMIT), "--length", str(LENGTH), "--batch", "2", *options]


def test_losses_equal_mlx(run, folder, cuda, tmp_path, monkeypatch, capsys):
    from torch_evaluation import generation

    monkeypatch.setattr(generation, "REPEATS", 1)
    monkeypatch.setattr(generation, "PROMPTS", 2)
    assert cuda.command(arguments(folder, "--json", str(tmp_path / "found.json"), "--generate", "8")) == 0
    results = json.loads((tmp_path / "found.json").read_text())
    assert list(results["texts"]) == ["python", "requests", "sql", "requests_more"]
    mixture_routing = formats.mixture_routing(run)
    routed, unrestricted = (
        Routing(mixture_routing.top_k, mx.array(mixture_routing.temperature)),
        Routing(None, mx.array(1.0)),
    )
    for source in (run.config.growth.base_skill, *run.config.skills):
        skill = stream.prepare_skill(source, run.config.data, run.base.tokenizer, run.config.seed)
        texts = cuda.documents(source, run.base.tokenizer, cuda.parse(arguments(folder)))
        assert len(texts) == LIMIT
        for (tokens, _), piece in zip(texts, skill.test.segments, strict=False):  # the run's own test texts
            assert tokens[:40].tolist() == piece.tokens[:40].tolist()
        pieces = packing.split_documents([Document(*text) for text in texts], 512)
        domain = make_domains({source.name: Split(pieces, LIMIT)}, 512, 1)[source.name]
        row = results["texts"][source.name]
        assert set(row) == {"mixture", "base", "requests", "sql"}
        expected = {
            name: evaluate(run.model, domain, unrestricted, c).loss
            for c, name in enumerate(formats.expert_names(run.pool))
        }
        expected["mixture"] = evaluate(run.model, domain, routed).loss
        for name, measured in row.items():
            assert abs(measured["nats"] - expected[name]) < 1e-3
            assert measured["speed"] > 0
    generated = results["generated"]
    assert list(generated) == ["the runtime", "the runtime, no caches", "PEFT's X-LoRA"]
    assert all((entry["same"], entry["prompts"]) == (2, 2) for entry in generated.values())
    assert "8 tokens, greedily" in capsys.readouterr().out


def test_a_missing_source_is_named_and_skipped(folder, cuda, tmp_path, capsys):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    own_texts = tmp_path / "mine.jsonl"
    own_texts.write_text("".join(json.dumps({"text": f"SELECT {i} FROM t"}) + "\n" for i in range(30)))

    def remove_sources(manifest) -> None:
        manifest["base_skill"], manifest["sources"] = None, manifest["sources"][1:2]
        manifest["sources"][0]["source"] = "gone.jsonl"

    change_json(copy, "dylora.json", remove_sources)
    with pytest.raises(Exception, match="no domain's text could be read; give some with --data NAME=SOURCE"):
        cuda.command(arguments(copy))
    assert cuda.command(arguments(copy, "--data", f"mine={own_texts}", "--json", str(tmp_path / "found.json"))) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "sql is left out: gone.jsonl: no such file" in out
    assert "say where it is with --data sql=FILE" in out
    assert list(json.loads((tmp_path / "found.json").read_text())["texts"]) == ["mine"]
    known = cuda.domains(cuda.parse(arguments(copy, "--data", f"sql={own_texts}")))
    assert [(source.source, source.limit) for source in known] == [
        (str(own_texts), 40)
    ]  # the other settings are the run's
    assert cuda.command(arguments(copy, "--data", f"sql={own_texts}", "--json", str(tmp_path / "found.json"))) == 0
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
def test_mistakes_are_refused_in_one_line(folder, cuda, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    copy, (change, options, message) = Path(shutil.copytree(folder, tmp_path / "copy")), MISTAKES[kind]
    change(copy)
    assert run_command(cuda.command, [*arguments(copy), *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_without_a_device_it_reports_the_cpu(folder, cuda, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    _, model, _ = cuda.load(cuda.parse([str(folder)]))
    assert (model.device.type, str(model.dtype)) == ("cpu", "torch.float32")
    assert "no CUDA device here: on the CPU, in float32" in capsys.readouterr().out
