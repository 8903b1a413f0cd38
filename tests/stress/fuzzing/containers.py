"""Mutate safetensors and npz files: lengths, offsets, dtypes and shapes of arrays, consistently or not."""

from __future__ import annotations

import io
import json
import math
import struct
import zipfile
from collections.abc import Sequence
from random import Random
from typing import Any

from fuzzing import values

BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4,
         "I64": 8, "U64": 8, "F64": 8, "C64": 8}  # fmt: skip
SIZES = (
    0,
    1,
    2,
    3,
    4,
    8,
    16,
    255,
    1 << 16,
    1 << 20,
    1 << 31,
    (1 << 31) - 1,
    1 << 32,
    1 << 62,
    1 << 63,
    (1 << 64) - 1,
    -1,
    -2,
    -(1 << 31),
)
PATTERNS = (
    b"\0\0\0\0",
    b"\0\0\x80\x3f",
    b"\0\0\xc0\x7f",
    b"\0\0\x80\x7f",
    b"\xff\xff\x7f\x7f",
    b"\1\0\0\0",
    b"\xff\xff\xff\xff",
    b"\0\0\0\x80",
)
"""Four bytes of an array: as float32 0, 1, NaN, infinity, the largest value, the smallest, all bits set, -0."""
Array = tuple[str, list[Any], bytes]
"""An array of a safetensors file: dtype, shape, data."""


def read_safetensors(data: bytes) -> tuple[dict[str, Array], dict[str, str] | None]:
    """Return the arrays by name, and the metadata. Raises ValueError if the bytes are not a safetensors file."""
    if len(data) < 8:
        raise ValueError("no header")
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    metadata, body, arrays = header.pop("__metadata__", None), data[8 + length :], {}
    for name, entry in header.items():
        try:
            start, end = entry["data_offsets"]
            arrays[name] = (entry["dtype"], list(entry["shape"]), body[start:end])
        except (TypeError, KeyError) as error:
            raise ValueError("no entry") from error
    return arrays, metadata


def write_safetensors(arrays: dict[str, Array], metadata: Any = None) -> bytes:
    """Return the bytes of a safetensors file. The metadata may have any type."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    parts, at = [], 0
    for name, (dtype, shape, data) in arrays.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        parts.append(data)
        at += len(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


def of_safetensors(data: bytes, rng: Random, donor: bytes, words: Sequence[str]) -> bytes:
    """Mutate a safetensors file: its arrays, with a consistent header, and often the header too, which then contradicts the data."""
    arrays, metadata = read_safetensors(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.15:
            metadata = values.change(metadata or {}, rng, None, words) if rng.random() < 0.8 else values.odd(rng)
        elif arrays:
            _change_array(arrays, rng, words)
    content = write_safetensors(arrays, metadata)
    return content if rng.random() < 0.6 else _change_header(content, rng)


def _change_array(arrays: dict[str, Array], rng: Random, words: Sequence[str]) -> None:
    name, kind = rng.choice(list(arrays)), rng.randrange(8)
    dtype, shape, data = arrays[name]
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        new_name = (
            rng.choice(words)
            if words and rng.random() < 0.6
            else rng.choice((name + "x", name[1:], "", "\ud800", "a\0", "0"))
        )
        arrays[str(new_name)] = arrays.pop(name)
    elif kind == 2:
        arrays[str(rng.choice(words or ("x",)))] = arrays[name]
    elif kind == 3:
        arrays[name] = fitted(rng.choice(list(BYTES)), shape, data)
    elif kind == 4:
        arrays[name] = fitted(dtype, _shape(shape, rng), data)
    elif kind == 5 and shape:
        arrays[name] = fitted(
            dtype, rng.choice((shape[::-1], shape[:-1], [*shape, 1], [1, *shape], [math.prod(shape)])), data
        )
    else:
        start = rng.randrange(0, len(data) // 4 + 1) * 4
        repeats = rng.choice((1, 1, max(1, len(data) // 4)))
        arrays[name] = (
            dtype,
            shape,
            (data[:start] + rng.choice(PATTERNS) * repeats + data[start + 4 * repeats :])[: len(data)],
        )


def _shape(shape: list[Any], rng: Random) -> list[Any]:
    """Return the shape with one size changed, small enough to write the data."""
    changed = list(shape) or [1]
    changed[rng.randrange(len(changed))] = rng.choice((0, 1, 2, 3, 5, 8, 9, 64))
    return changed


def fitted(dtype: str, shape: list[Any], data: bytes) -> Array:
    """Return an array of this dtype and shape, with the data repeated or cut to fit. Raises ValueError if it is too large."""
    count = BYTES[dtype] * math.prod(shape)
    if count > 1 << 17 or count < 0:
        raise ValueError("too large to write")
    data = data or b"\0"
    return dtype, shape, (data * (count // len(data) + 1))[:count]


def _change_header(content: bytes, rng: Random) -> bytes:
    """Change the length, offsets, dtypes or shapes of the header so that they contradict the data."""
    length = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    entries = [name for name in header if name != "__metadata__"]
    kind = rng.randrange(7)
    if kind == 0:
        stated = rng.choice((*SIZES, length + 1, length - 1, length + len(body), 10**8 - 1))
        return struct.pack("<Q", stated % (1 << 64)) + content[8:]
    if kind == 1:
        return content[: rng.randint(0, len(content))]
    if kind == 2:
        return content + bytes(rng.randrange(1, 100))
    if kind == 3 or not entries:
        header = values.change(header, rng)
        text = values.encode(header, rng)
        return struct.pack("<Q", len(text)) + text + body
    entry = header[rng.choice(entries)]
    if kind == 4:
        entry["data_offsets"][rng.randrange(2)] = rng.choice((*SIZES, len(body), len(body) + 1))
    elif kind == 5:
        entry["shape"] = [rng.choice(SIZES) for _ in range(rng.randrange(5))]
        if rng.random() < 0.5:  # an end offset that matches the size modulo 2**64
            size = BYTES.get(entry["dtype"], 4) * math.prod(entry["shape"]) % (1 << 64)
            entry["data_offsets"][1] = entry["data_offsets"][0] + size
    else:
        entry["dtype"] = rng.choice((*BYTES, "", "F128", "f32", "F4", None, 3))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def of_npz(data: bytes, rng: Random, donor: bytes, words: Sequence[str]) -> bytes:
    """Mutate an npz file: delete, copy or rename an array, or change its header or data."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            members = {name: file.read(name) for name in file.namelist()}
    except Exception as error:  # zipfile raises errors of many types
        raise ValueError("no npz file") from error
    for _ in range(rng.choice((1, 1, 2, 3))):
        if members:
            _change_member(members, rng)
    buffer, compression = io.BytesIO(), rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, member in members.items():
            file.writestr(name, member)
    return buffer.getvalue()


def _change_member(members: dict[str, bytes], rng: Random) -> None:
    name, kind = rng.choice(list(members)), rng.randrange(6)
    member = members[name]
    if kind == 0:
        del members[name]
    elif kind == 1:
        members[rng.choice(list(members))] = member
    elif kind == 2:
        members[rng.choice((name + "x", name.removesuffix(".npy"), "a", "../a.npy"))] = members.pop(name)
    elif kind == 3 and len(member) > 10:
        at = rng.randrange(10, len(member))
        members[name] = member[:at] + bytes([rng.randrange(256)]) * rng.choice((1, 4, 8)) + member[at + 1 :]
    elif kind == 4:
        members[name] = member[: rng.randint(0, len(member))]
    else:
        dtype = rng.choice(
            ("<i4", "|b1", "<i8", "<f4", ">i4", "<u2", "|O", "<c8", "|S4", "<U2", "|V8", "<M8[s]", "[('a', '<i4')]")
        )
        sizes = [rng.choice((0, 1, 3, 12, 48, 10**6, 1 << 31, 1 << 62, -1)) for _ in range(rng.choice((0, 1, 1, 1, 2)))]
        members[name] = npy_header(dtype, sizes, rng.random() < 0.1) + member[128:]


def npy_header(dtype: str, shape: Sequence[int], fortran: bool = False) -> bytes:
    """Return the first 128 bytes of an npy file of this dtype and shape, which need not be valid."""
    sizes = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
    described = dtype if dtype.startswith("[") else repr(dtype)
    text = f"{{'descr': {described}, 'fortran_order': {fortran}, 'shape': {sizes}, }}".encode()
    text = text.ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
