"""Mutate files with knowledge of their format, so that most inputs are almost valid and reach deep into a reader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import yaml

from fuzzing import containers, values
from fuzzing.target import LARGEST

TOKENS = (
    b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xc3\x28", b"\xed\xa0\x80", b"\r", b"\n", b"\r\n", b"\x0c", b"\x85",
    b"\xe2\x80\xa8", b'"', b"'", b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\u0000", b"\\ud800", b"NaN", b"Infinity", b"-", b"1e999",
    b"9" * 400, b"null", b"true", b'{"a":1}', b"[[[[[[[[", b" " * 300,
)  # fmt: skip
YAML_TOKENS = (
    b"&a ", b"*a", b"<<: *a\n", b"!!python/object/apply:os.getcwd []", b"!!binary aGk=", b"!!set {a}", b"!!timestamp 2001-01-01",
    b"2001-01-01", b"---\n", b"1:30", b"...\n", b"? ", b": ", b"- ", b"|\n", b">\n", b"#", b"~", b".nan", b".inf", b"0o7", b"0x1F",
    b"1_000", b"\t", b"%YAML 9.9\n", b"!!float ", b"!!int ", b"!x ", b"{", b"}", b"[", b"]", b"on", b"no", b"1e3", b"\xff", b"\xc2\x85",
)  # fmt: skip


def mutated(data: bytes, form: str, rng: Random, donor: bytes = b"", words: Sequence[str] = ()) -> bytes:
    """Return a mutated copy of a file.

    Args:
        data: the file.
        form: its format, a key of FORMS; any other value mutates raw bytes.
        rng: the source of randomness.
        donor: another file of the format, from which parts may be copied.
        words: names that mean something to the reader.
    """
    mutator = raw
    if rng.random() < 0.85:
        mutator = FORMS.get(form, raw)
    try:
        content = mutator(data, rng, donor, words)
    except Exception:  # an earlier mutation broke the format; a mutator may then fail with any type of error
        content = raw(data, rng, donor, words)
    return content[:LARGEST]


def raw(
    data: bytes, rng: Random, donor: bytes = b"", words: Sequence[str] = (), tokens: Sequence[bytes] = TOKENS
) -> bytes:
    """Return the bytes with some changed, deleted, doubled, inserted or copied from the donor."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        start, kind = rng.randint(0, len(content)), rng.randrange(8)
        end = min(len(content), start + rng.choice((1, 1, 2, 4, 8, 30, 200)))
        if kind == 0:
            content[start:end] = rng.choice(tokens)
        elif kind == 1:
            content[start:start] = rng.choice(tokens)
        elif kind == 2:
            del content[start:end]
        elif kind == 3 and start < len(content):
            content[start] ^= 1 << rng.randrange(8)
        elif kind == 4 and start < len(content):
            content[start] = rng.randrange(256)
        elif kind == 5:
            content[start:start] = content[start:end] * rng.choice((1, 2, 20))
        elif kind == 6 and donor:
            donor_start = rng.randrange(len(donor))
            content[start:end] = donor[donor_start : donor_start + rng.choice((4, 30, 200))]
        elif kind == 7:
            del content[slice(start, None) if rng.random() < 0.5 else slice(start)]
    return bytes(content)


def of_json(data: bytes, rng: Random, donor: bytes, words: Sequence[str]) -> bytes:
    """Mutate the values of a JSON file."""
    return values.encode(values.change(values.decode(data), rng, _tree(donor, rng), words), rng)


def _tree(donor: bytes, rng: Random) -> Any:
    if not donor or rng.random() < 0.6:
        return None
    try:
        return values.decode(donor)
    except (ValueError, RecursionError):
        return None


def of_lines(data: bytes, rng: Random, donor: bytes, words: Sequence[str]) -> bytes:
    """Mutate a JSONL file: a line as JSON, or lines deleted, doubled, moved, joined or cut."""
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, kind = rng.randrange(len(lines)), rng.random()
        if kind < 0.75:
            other = rng.choice(donor.split(b"\n")) if donor else b""
            lines[at] = of_json(lines[at], rng, other, words) if lines[at].strip() else rng.choice(TOKENS)
        elif kind < 0.8 and len(lines) > 1:
            del lines[at]
        elif kind < 0.85:
            lines.insert(at, lines[at])
        elif kind < 0.9:
            lines[at] = lines[at][: rng.randint(0, len(lines[at]))]
        elif kind < 0.95:
            lines.insert(at, rng.choice(TOKENS))
        else:
            rng.shuffle(lines)
    return rng.choice((b"\n", b"\n", b"\n", b"\n", b"\r\n", b"\r")).join(lines)


def of_yaml(data: bytes, rng: Random, donor: bytes, words: Sequence[str]) -> bytes:
    """Mutate a YAML file: its values, written as JSON (a subset of YAML), or its bytes with YAML syntax inserted."""
    if rng.random() < 0.3:
        return raw(data, rng, donor, words, YAML_TOKENS)
    if data.count(b"[") + data.count(b"{") + data.count(b"- ") > 2000:
        raise ValueError("perhaps nested so deeply that PyYAML crashes the process")
    try:
        tree = yaml.load(data, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        content = values.encode(values.change(tree, rng, None, words), rng)
    except (yaml.YAMLError, TypeError) as error:  # TypeError: a date, a set, bytes
        raise ValueError("not a tree of JSON's types") from error
    return content if rng.random() < 0.9 else content.replace(b"NaN", b".nan").replace(b"Infinity", b".inf")


Change = Callable[[bytes, Random, bytes, Sequence[str]], bytes]
FORMS: dict[str, Change] = {
    "json": of_json, "lines": of_lines, "yaml": of_yaml, "safetensors": containers.of_safetensors, "npz": containers.of_npz,
}  # fmt: skip
