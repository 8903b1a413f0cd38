"""Exported folders: all of it or nothing, and what is read again has the hashes it was written with."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from dylora_mlx.errors import Failure, UserError
from dylora_mlx.exporting.folder import FORMAT, MANIFEST, FolderContent, read_arrays, read_manifest, write_folder


def content() -> FolderContent:
    arrays = {"b": mx.arange(6).reshape(2, 3), "a": mx.ones((2,), mx.bfloat16)}
    return {"1/weights.safetensors": arrays, "config.json": {"z": {"10": 1, "9": 2}, "a": 3}, "README.md": "# card\n"}


@pytest.fixture
def written(tmp_path):
    write_folder(tmp_path / "out", content(), {"kind": "test"})
    return tmp_path / "out"


def change(path, text: str) -> None:
    path.write_text(text)


def manifest(out, **fields) -> None:
    path = out / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_what_is_written_is_read(written):
    found = read_manifest(written)
    assert (found["kind"], found["format"]) == ("test", FORMAT)
    assert found["sha256"].keys() == {"1/weights.safetensors", "config.json"}
    arrays = read_arrays(written / "1" / "weights.safetensors")
    assert arrays["a"].dtype == mx.bfloat16
    assert mx.array_equal(arrays["b"], content()["1/weights.safetensors"]["b"])
    assert (written / "config.json").read_text() == json.dumps(content()["config.json"], indent=2) + "\n"
    assert [p.name for p in written.parent.iterdir()] == ["out"]


def test_the_card_may_be_edited(written):
    change(written / "README.md", "another")
    read_manifest(written)


def test_bytes_do_not_depend_on_the_order_of_arrays(written, tmp_path):
    arrays = content()["1/weights.safetensors"]
    write_folder(tmp_path / "again", {"w.safetensors": dict(sorted(arrays.items()))}, {})
    assert (tmp_path / "again" / "w.safetensors").read_bytes() == (written / "1" / "weights.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (OSError(28, "No space left"), Failure, r"\(No space left\); free some space"),
        (
            RuntimeError("[write] Unable to write 9 bytes"),
            Failure,
            r"\(\[write\] Unable to write 9 bytes\); free some space",
        ),
        (RuntimeError("write failed"), UserError, r"\(write failed\); choose another --out"),
    ],
)
def test_a_write_that_fails_leaves_nothing(tmp_path, failure, kind, message):
    def fails():
        raise failure

    with pytest.raises(kind, match=f"out: cannot be written {message}"):
        write_folder(tmp_path / "out", {**content(), "late.safetensors": fails}, {})
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(UserError, match="exists already"):
            write_folder(tmp_path / name, content(), {})
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(UserError, match="cannot be written"):
        write_folder(tmp_path / "file" / "below", content(), {})


def truncated(out):
    path = out / "1" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-2])


DAMAGE = [
    (lambda out: change(out / "config.json", '{"a": 4}'), r"config\.json: damaged or changed"),
    (truncated, r"weights\.safetensors: damaged or changed"),
    (lambda out: (out / "config.json").unlink(), r"config\.json: missing from the export"),
    (lambda out: (out / MANIFEST).unlink(), r"dylora\.json: missing"),
    (lambda out: change(out / MANIFEST, "{"), "not a readable JSON file"),
    (lambda out: (out / MANIFEST).write_bytes(b"\xff\xfe"), "not a readable JSON file"),
    (lambda out: change(out / MANIFEST, "[]"), "not a JSON object"),
    (lambda out: manifest(out, format=2), r"format 2, but this version of dylora_mlx reads format 1"),
    (lambda out: manifest(out, sha256=["config.json"]), "no complete export"),
    (lambda out: manifest(out, sha256={"../x": "0"}), r"'\.\./x' leads out"),
    (lambda out: manifest(out, sha256={"1/../../x": "0"}), "leads out"),
    (lambda out: manifest(out, sha256={"/etc/hostname": "0"}), "leads out"),
    (lambda out: manifest(out, sha256={"": "0"}), "leads out"),
    (lambda out: manifest(out, sha256={"1": "0"}), "missing from the export"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_named(written, damage, message):
    (written.parent / "x").write_text("outside")
    damage(written)
    with pytest.raises(UserError, match=message):
        read_manifest(written)


def test_arrays_that_are_none(written):
    path = written / "1" / "weights.safetensors"
    assert read_arrays(path).keys() == {"a", "b"}
    for size in (0, 5, 60, path.stat().st_size - 1):
        cut = written / f"cut{size}.safetensors"
        cut.write_bytes(path.read_bytes()[:size])
        with pytest.raises(UserError, match="not a whole safetensors file"):
            read_arrays(cut)
    with pytest.raises(UserError, match=r"none\.safetensors: missing"):
        read_arrays(written / "none.safetensors")
