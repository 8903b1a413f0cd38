"""Reading GGUF headers, refusing files that are no whole models, and the cache of converted ones."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from dylora_mlx.errors import Failure, UserError
from dylora_mlx.model.base import load
from dylora_mlx.model.base.load import load_base, load_tokenizer, locate_base
from dylora_mlx.model.gguf import convert as conversion
from dylora_mlx.model.gguf.convert import cache_folder, cached_folder, convert
from dylora_mlx.model.gguf.reader import GGUFFile, is_gguf
from tests.gguf_files import Q, byte_level, write_gguf


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dylora_mlx" / "bases"


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    """The content of a small, whole file."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return write_gguf(path, "llama", (Q.Q8_0, Q.Q4_0), num_hidden_layers=1).path.read_bytes()


def written(folder: Path, content: bytes, name: str = "m.gguf") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def test_the_header_is_what_the_package_reads(tmp_path):
    more = {"general.numbers": [1, -2, 3], "general.texts": ["a", "", "ü"], "general.flag": True, "general.share": 0.25}
    path = write_gguf(tmp_path / "m.gguf", "gemma3", (Q.Q8_0,), byte_level("smollm"), more).path
    found, expected = GGUFFile(path), gguf.GGUFReader(path)
    values = {key: field.contents() for key, field in expected.fields.items() if not key.startswith("GGUF.")}
    assert found.metadata == values
    assert {
        tensor.name: (int(tensor.tensor_type), tuple(tensor.shape.tolist()[::-1]), tensor.data_offset)
        for tensor in expected.tensors
    } == {name: (entry.type_id, entry.shape, entry.offset) for name, entry in found.tensors.items()}
    assert (found.architecture, found.number("attention.layer_norm_rms_epsilon")) == ("gemma3", 1e-6)


def test_a_file_is_known_by_its_first_bytes(tmp_path, content):
    assert is_gguf(written(tmp_path, content, "sha256-00ff"))
    assert not is_gguf(written(tmp_path, b"GGU"))
    assert not is_gguf(tmp_path)
    assert not is_gguf(tmp_path / "nosuch")


@pytest.mark.parametrize("size", [4, 7, 8, 20, 24, 100, 1000, 20_000, -1])
def test_truncated_files(tmp_path, cache, content, size):
    path = written(tmp_path, content[:size])
    with pytest.raises(UserError, match=r"m.gguf: (not a whole GGUF file|truncated, )") as raised:
        load_base(str(path))
    assert "download or copy it again" in str(raised.value)
    assert not cache.exists() or [p.name for p in cache.iterdir()] == ["hashes.json"]


def test_random_damage_is_a_line_or_a_model(tmp_path, content):
    """Damaged lengths must not be believed: memory for 2 ** 60 tokens is not there."""
    rng, refused = random.Random(1), 0
    header = content.index(b"token_embd.weight")
    for number in range(150):
        damaged = bytearray(content)
        place = rng.randrange(4, header if number % 2 else len(content) - 8)
        damaged[place : place + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**60, 2**64 - 1, rng.getrandbits(64)]))
        try:
            convert(written(tmp_path, bytes(damaged)), tmp_path / f"out{number}")
        except UserError:
            refused += 1
    assert refused > 50
    assert not list(tmp_path.glob(".*partial"))


def renumbered(content: bytes, name: bytes, type_id: int) -> bytes:
    """Change the quantisation type of a tensor in the header."""
    counted = struct.pack("<Q", len(name)) + name
    start = content.index(counted) + len(counted)
    (dimensions,) = struct.unpack_from("<I", content, start)
    place = start + 4 + 8 * dimensions
    return content[:place] + struct.pack("<I", type_id) + content[place + 4 :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: renumbered(c, b"output.weight", 250), r"output.weight has an unknown quantisation \(ggml type 250"),
        (
            lambda c: renumbered(c, b"output.weight", int(Q.I8)),
            "quantised as I8, which the gguf package cannot dequantise",
        ),
        (
            lambda c: renumbered(c, b"output.weight", int(Q.Q4_K)),
            r"unknown quantisation \(ggml type 12, shape \[601, 64\]",
        ),
        (lambda c: renumbered(c, b"output.weight", int(Q.F64)), "truncated, output.weight would end at byte"),
        (lambda c: c[:4] + struct.pack("<I", 1) + c[8:], "GGUF version 1, but only 2 and 3 can be read"),
        (lambda c: c[:4] + struct.pack(">I", 3) + c[8:], "a big-endian GGUF file"),
        (lambda c: c[:8] + struct.pack("<Q", 2**62) + c[16:], "not a whole GGUF file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, change, message):
    path = written(tmp_path, change(content))
    with pytest.raises(UserError, match=message):
        convert(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"]


def test_values_that_are_not_finite(tmp_path):
    made = write_gguf(tmp_path / "m.gguf", "qwen3", (Q.Q8_0,), num_hidden_layers=1)
    file, data = GGUFFile(made.path), bytearray(made.path.read_bytes())
    place = file.tensors["blk.0.ffn_up.weight"].offset
    data[place : place + 2] = np.float16("nan").tobytes()
    with pytest.raises(UserError, match=r"damaged, blk.0.ffn_up.weight has values that are not finite"):
        convert(written(tmp_path, bytes(data)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.type": "adapter", "adapter.type": "lora"}, "a LoRA adapter, not a model"),
        ({"general.type": "mmproj"}, r"a projector of images \(mmproj\)"),
        ({"split.count": 3, "split.no": 0}, "one part of a split model.*llama-gguf-split --merge"),
    ],
)
def test_files_of_other_kinds(tmp_path, metadata, message):
    path = write_gguf(tmp_path / "m.gguf", "llama", num_hidden_layers=1, metadata=metadata).path
    with pytest.raises(UserError, match=message):
        convert(path, tmp_path / "out")


@pytest.mark.parametrize("architecture", ["mistral3", "gemma2", "qwen2", "clip"])
def test_other_architectures(tmp_path, architecture):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
    writer.add_uint32(f"{architecture}.block_count", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    expected = "a projector of images" if architecture == "clip" else (
        f"a GGUF file of architecture '{architecture}', but a base must be one of gemma3, llama, qwen3"
    )  # fmt: skip
    with pytest.raises(UserError, match=expected):
        convert(tmp_path / "m.gguf", tmp_path / "out")


def test_names_of_parts(tmp_path, content):
    with pytest.raises(UserError, match="one part of a split model"):
        GGUFFile(written(tmp_path, content, "m-00002-of-00003.gguf"))
    assert GGUFFile(written(tmp_path, content, "m-00001-of-00001.gguf")).architecture == "llama"


def test_a_vocabulary_alone_has_no_weights(tmp_path):
    drop = ("token_embd.weight", "output.weight")
    path = write_gguf(tmp_path / "m.gguf", "llama", num_hidden_layers=1, drop=drop).path
    with pytest.raises(UserError, match=r"holds no weights \(token_embd.weight is missing\)"):
        convert(path, tmp_path / "out")


def test_without_the_package(tmp_path, cache, monkeypatch, content):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'dylora-mlx\[gguf\]'"):
        load_base(str(written(tmp_path, content)))
    assert not list(cache.glob("m-*"))


def test_a_file_is_converted_once(tmp_path, cache, monkeypatch, content):
    path = written(tmp_path, content, "model.v1 (a).gguf")
    folder = locate_base(str(path))
    assert folder.parent == cache == cache_folder()
    assert folder.name.startswith("model.v1-a-")
    origin = json.loads((folder / "gguf.json").read_text())
    assert origin == {"file": path.name, "types": {"Q8_0": 5, "Q4_0": 4, "F32": 4}, "format": conversion.FORMAT}

    def fail(*args):
        pytest.fail("converted again")

    monkeypatch.setattr(conversion, "convert", fail)
    assert locate_base(str(path)) == folder
    assert load_tokenizer(str(path)).encode_text("a")
    copy = written(tmp_path, content, "model.v1 (a).copy.gguf")
    monkeypatch.setattr(conversion, "convert", lambda source, out: out.mkdir())
    assert locate_base(str(copy)) != folder  # another name, the same hash
    assert locate_base(str(copy)).name[-16:] == folder.name[-16:]


def test_a_changed_file_is_converted_again(tmp_path, cache, monkeypatch, content):
    path = written(tmp_path, content)
    first = cached_folder(path)
    place = GGUFFile(path).tensors["blk.0.attn_norm.weight"].offset
    path.write_bytes(content[:place] + bytes(4) + content[place + 4 :])
    os.utime(path, ns=(1, 1))
    assert cached_folder(path) != first
    path.write_bytes(content)
    assert cached_folder(path) == first
    (cache / "hashes.json").write_text("[")  # a damaged memory of hashes costs reading the file, nothing else
    assert cached_folder(path) == first
    monkeypatch.setattr(conversion, "FORMAT", 2)
    assert cached_folder(path) != first


def _locate(path: str, queue: multiprocessing.Queue) -> None:
    queue.put(str(locate_base(path)))


def test_processes_that_need_one_file_convert_it_once(tmp_path, cache, content):
    path, context = written(tmp_path, content), multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_locate, args=(str(path), queue)) for _ in range(2)]
    for process in processes:
        process.start()
    folders = {queue.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert len(folders) == 1
    assert {p.name for p in cache.iterdir()} == {Path(folders.pop()).name, "hashes.json"}


def test_an_interrupted_conversion_leaves_nothing(tmp_path, cache, monkeypatch, content):
    path = written(tmp_path, content)

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_weights", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cached_folder(path)
    assert [p.name for p in cache.iterdir()] == ["hashes.json"]
    assert cached_folder(path).is_dir()


def test_a_full_disk_and_a_cache_that_cannot_be_written(tmp_path, cache, monkeypatch, content):
    path = written(tmp_path, content)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "write_weights", full)
    with pytest.raises(Failure, match="free some space"):
        cached_folder(path)
    assert [p.name for p in cache.iterdir()] == ["hashes.json"]
    (tmp_path / "taken").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    with pytest.raises(UserError, match=r"set XDG_CACHE_HOME to a folder that can be written.*dylora convert-base"):
        cached_folder(path)


def test_names_that_lead_to_no_model(tmp_path, cache, monkeypatch, content):
    monkeypatch.setattr(load, "_download", lambda *args: pytest.fail("looked on the hub"))
    written(tmp_path, b"<!DOCTYPE html>")
    with pytest.raises(UserError, match=r"m.gguf: not a GGUF file, it begins with other bytes"):
        load_base(str(tmp_path / "m.gguf"))
    with pytest.raises(UserError, match=r"models/m.gguf: no such file"):
        load_base("models/m.gguf")
    with pytest.raises(
        UserError, match=r"no config.json, so not a model folder; give a GGUF file by its own path, such as .*m.gguf"
    ):
        load_base(str(tmp_path))
