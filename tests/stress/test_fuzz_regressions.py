"""Regression tests for fuzzing findings in files from elsewhere, each with the smallest file that caused the traceback or crash.

Each file must now give a UserError, or be read.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fuzzing import of_adapters, of_data, samples
from fuzzing.target import TARGETS

from dylora_mlx.cli.options import parse_add, parse_train
from dylora_mlx.config.load import load_config, to_yaml
from dylora_mlx.data import cache
from dylora_mlx.data.encoding import Document
from dylora_mlx.data.tokenized import TokenizedSource
from dylora_mlx.errors import UserError
from dylora_mlx.evaluation import problems
from dylora_mlx.exporting.folder import MANIFEST, read_arrays
from dylora_mlx.importing import adapters
from dylora_mlx.model.base.load import fingerprint, load_base
from dylora_mlx.system import files

BEYOND = 10**400
"""An integer beyond the range of floats."""
DIGITS = "9" * 5000
"""An integer of more digits than Python converts."""
DEEP = "[" * 100_000
"""JSON or YAML nested too deeply for any parser."""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def wrote(path: Path, content: Any) -> Path:
    """Write bytes or text to a file; return its path."""
    path.write_bytes(content if isinstance(content, bytes) else str(content).encode("utf-8", "surrogatepass"))
    return path


def header(entry: dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file of one array `a`.

    Args:
        entry: its entry in the header.
        data: the bytes after the header.
        length: the stated length of the header; None for the true one.
    """
    text = json.dumps({"a": entry}).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[Any], begin: int = 0, end: int = 16, dtype: str = "F32") -> dict[str, Any]:
    """Return a header entry of a safetensors file."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        header(entry([-2, -2]), bytes(16)),  # MLX reads this as an array of four
        header(entry([1 << 16] * 4, 0, 0)),  # the product overflows to 0
        header(entry([4.5]), bytes(16)), header(entry([1 << 20, 1 << 20]), bytes(16)), header(entry([4], 16, 0), bytes(16)),
        header(entry([4], -16, 0), bytes(16)), header(entry([4], 1 << 62, (1 << 62) + 16), bytes(16)),
        header(entry([4], dtype="F7"), bytes(16)), header(entry([4]), bytes(15)),
        header(entry([4]), bytes(16), length=1 << 62), b"", b"\0" * 7, struct.pack("<Q", 200_000) + DEEP.encode() * 2,
    ],
    ids=range(13),
)  # fmt: skip
def test_headers_that_do_not_agree_with_the_file(tmp_path, content):
    path = wrote(tmp_path / "model.safetensors", content)
    for read in (files.tensor_offsets, read_arrays, lambda path: fingerprint(path.parent, {})):
        with pytest.raises(UserError, match="not a whole safetensors file"):
            read(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": 3}, "rank_pattern is 3, not an object"), ({"alpha_pattern": [1]}, "not an object"),
        ({"r": BEYOND}, "not a number above 0"), ({"r": 2.5}, "not a whole number"),
        ({"lora_alpha": 1e300}, "beyond float32"), ({"lora_alpha": 5e-324}, "beyond float32"),
    ],
)  # fmt: skip
def test_an_adapters_numbers(tmp_path, options, message):
    of_adapters.peft_folder(tmp_path)
    path = tmp_path / adapters.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    with pytest.raises(UserError, match=message):
        adapters.to_expert(adapters.read_adapter(tmp_path), samples.SHAPES, tmp_path)


def test_a_rank_that_no_module_has_takes_no_memory(tmp_path):
    of_adapters.peft_folder(tmp_path)
    path = tmp_path / adapters.CONFIG
    ranks = {f"model.layers.0.self_attn.{name}": 2 for name in samples.SHAPES[0]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 10**9, "lora_alpha": 10**9, "rank_pattern": ranks}))
    assert adapters.to_expert(adapters.read_adapter(tmp_path), samples.SHAPES, tmp_path).rank == 2


def test_factors_of_no_rank(tmp_path):
    of_adapters.peft_folder(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    arrays = {name: mx.zeros((0, 8) if "lora_A" in name else (4, 0)) for name in dict(mx.load(str(path)))}
    of_adapters.save(path, arrays)
    with pytest.raises(UserError, match="an empty factor"):
        adapters.read_adapter(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["sources"][0].update(source=["a"]), lambda manifest: manifest["sources"][0].update(limit="many"),
        lambda manifest: manifest["base_skill"].update(preset="no such"),
        lambda manifest: manifest["base_skill"].update(include="*.py"),
        lambda manifest: manifest["base_skill"].update(exclude=[1]),
        lambda manifest: manifest.update(projections=["q_proj", "q_proj"]),
        lambda manifest: manifest["splits"].update(seed=1e400), lambda manifest: manifest["base"].update(name={"a": 1}),
        lambda manifest: manifest["sha256"].update({"x" * 300: "0"}), lambda manifest: manifest.update(top_k=True),
        lambda manifest: manifest.update(top_k=2**53),
    ],
    ids=range(11),
)  # fmt: skip
def test_a_mixtures_manifest(tmp_path, change):
    manifest = of_adapters.mixture(tmp_path)
    change(manifest)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError):
        of_adapters.import_mixture(tmp_path, [])


def test_a_temperature_beyond_any_integer_of_the_machine(tmp_path):
    of_adapters.mixture(tmp_path)
    path = tmp_path / adapters.CONFIG
    dense = {"enable_softmax": True, "enable_softmax_topk": False, "top_k_lora": None, "softmax_temperature": 10**30}
    path.write_text(json.dumps(json.loads(path.read_text()) | dense))
    of_adapters.import_mixture(tmp_path, of_adapters.SOURCES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (f'{{"a": {DIGITS}}}', "not a readable JSON file"), (DEEP, "not a readable JSON file"),
        (json.dumps(of_adapters.CONFIG_JSON | {"num_hidden_layers": 10**9}), "says 1000000000 layers, the weights hold"),
        (json.dumps(of_adapters.CONFIG_JSON | {"num_hidden_layers": BEYOND}), "says 100000000000 layers, the weights hold"),
        (json.dumps(of_adapters.CONFIG_JSON | {"model_type": ["llama"]}), "the base must be one of model_type"),
        (json.dumps(of_adapters.CONFIG_JSON | {"model_file": "evil.py"}), "never run"),
        (json.dumps(of_adapters.CONFIG_JSON | {"head_dim": []}), "could not be loaded"),
    ],
)  # fmt: skip
def test_a_bases_config(tmp_path, options, message):
    of_adapters.base_config(tmp_path)
    wrote(tmp_path / "config.json", options)
    with pytest.raises(UserError, match=message):
        load_base(str(tmp_path))


def test_a_number_of_too_many_digits_in_records(tmp_path):
    with pytest.raises(UserError, match="line 1: not JSON"):
        TARGETS["jsonl"].make(tmp_path)[1](f'{{"text": {DIGITS}}}\n'.encode())


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    with pytest.raises(UserError, match="half a surrogate pair"):
        TARGETS["records-text"].make(tmp_path)[1](b'{"text": "a\\ud800"}')


def test_a_cached_bos_that_is_learned(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    document = Document(np.array([2, 5, 1], np.int32), np.array([True, True, True]))
    cache.store("a", TokenizedSource({split: [document] for split in ("train", "validation", "test")}, "0" * 64))
    assert cache.load("a") is None


@pytest.mark.parametrize(
    "rows",
    [
        [{**of_data.MBPP[0], "test_list": 3}], [{**of_data.MBPP[0], "test_list": ["a", ["b"]]}], [{**of_data.MBPP[0], "code": []}],
        [{**of_data.MBPP[0], "test_imports": 1}], [of_data.SANITISED[0], {"code": "", "test_list": []}],
        [{**of_data.MBPP[0], "text": "\ud800"}], [{**of_data.HUMANEVAL[0], "prompt": None}],
    ],
    ids=range(7),
)  # fmt: skip
def test_problems_of_other_types(tmp_path, rows):
    with pytest.raises(UserError, match=r"line [12]: '"):
        problems.load_problems(wrote(tmp_path / "p.jsonl", of_data.lines(rows)))


def test_a_line_separator_within_a_problem_ends_no_line(tmp_path):
    text = json.dumps({**of_data.HUMANEVAL[0], "prompt": "a\u2028b"}, ensure_ascii=False)
    assert problems.load_problems(wrote(tmp_path / "p.jsonl", text))[0].prompt == "a\u2028b"


@pytest.mark.parametrize("text", ["# {title}", "null", "1e3", "- {line}", "&", "[{a}]"])
def test_a_template_is_not_read_as_yaml_again(tmp_path, text):
    quoted = json.dumps(text)
    path = wrote(tmp_path / "my.yaml", f"skills: [{{name: a, source: a.jsonl, text: {quoted}, contains: {quoted}}}]\n")
    parsed = parse_train(["--config", str(path)])
    assert parsed.config is not None
    assert (parsed.config.skills[0].text, parsed.config.skills[0].contains) == (text, text)
    reloaded = load_config(wrote(tmp_path / "again.yaml", to_yaml(parsed.config)))
    assert reloaded == parsed.config


@pytest.mark.parametrize("options", [["--skills", DEEP], ["--config", "deep.yaml"]])
def test_options_that_end_the_process_of_a_parser_in_c(tmp_path, options):
    wrote(tmp_path / "deep.yaml", f"skills: [{{name: a, source: b}}]\ntraining: {{epochs: '{DEEP}'}}\n")
    command = [sys.executable, "-m", "dylora_mlx.train", *options]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert (process.returncode, process.stderr.count("\n")) == (2, 1), process.stderr[-400:]
    assert "nested too deeply" in process.stderr


@pytest.mark.parametrize("text", ["# {title}", "null and void", "1e3", "- {line}", "[{a}]", "~"])
def test_a_template_on_a_command_line_stays_as_it_is(text):
    assert parse_add(["runs/a", "a.jsonl", "--name", "a", "--text", text])[1].text == text
