"""Pictures of coloured pixels as PNG data, for tables that are too large to read."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence


def data_uri(pixels: Sequence[Sequence[tuple[int, int, int]]]) -> str:
    """Return rows of RGB pixels, all of one length, as a PNG in a data URI (RFC 2083: eight bits, no filter)."""
    lines = b"".join(b"\0" + bytes(value for pixel in row for value in pixel) for row in pixels)
    header = struct.pack(">IIBBBBB", len(pixels[0]), len(pixels), 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    body = b"".join(_chunk(kind, content) for kind, content in chunks)
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
