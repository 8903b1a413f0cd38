"""Files of sources: supported endings and their formats, decompression, and the detection of unsupported files."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from pathlib import Path

from dylora_mlx.errors import UserError

TEXT_SUFFIXES = {
    ".py",
    ".sql",
    ".txt",
    ".md",
    ".markdown",
    ".rst",
    ".js",
    ".ts",
    ".c",
    ".h",
    ".cpp",
    ".rs",
    ".go",
    ".java",
    ".rb",
    ".sh",
    ".swift",
}
"""Endings of files that are read as plain text."""
TABLE_SUFFIXES = {".parquet", ".arrow"}
"""Endings of binary tables, which the package `datasets` reads."""
RECORD_SUFFIXES = {".jsonl", ".ndjson", ".json", ".csv", ".tsv", *TABLE_SUFFIXES}
"""Endings of files that hold many records."""
COMPRESSIONS = {".gz", ".bz2", ".xz", ".zst"}
"""Endings of compressed files. They follow any ending but a table's, which is compressed inside."""
FORMATS = (
    ".jsonl, .ndjson, .json, .csv and .tsv (each also with .gz, .bz2, .xz or .zst), .parquet, .arrow, "
    "and text such as .txt and .md"
)
"""Supported formats, for messages."""
_SIGNATURES = {
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a ZIP archive or an office document",
    b"{\\rtf": "an RTF document",
    b"\xd0\xcf\x11\xe0": "an office document",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GIF8": "a picture",
    b"\x1f\x8b": "gzip-compressed",
    b"BZh": "bzip2-compressed",
    b"\xfd7zXZ": "xz-compressed",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "an SQLite database",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
"""Kinds of unsupported or misnamed files, by their first bytes."""


def ending(path: Path) -> str:
    """Return a file's ending in lower case, with that of its compression: `.jsonl.gz`, `.txt`, or the empty string."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if len(suffixes) == 2 and suffixes[1] in COMPRESSIONS and suffixes[0] in TEXT_SUFFIXES | RECORD_SUFFIXES:
        return "".join(suffixes)
    return suffixes[-1] if suffixes else ""


def format_suffix(path: Path) -> str | None:
    """Return the ending that decides how a file is read, without that of its compression; None for an unknown ending."""
    first, compression = ending(path), None
    for suffix in COMPRESSIONS:
        if first.endswith(suffix) and first != suffix:
            first, compression = first.removesuffix(suffix), suffix
    if first in TABLE_SUFFIXES and compression:
        return None
    return first if first in TEXT_SUFFIXES | RECORD_SUFFIXES else None


def is_record_file(path: Path) -> bool:
    """Return whether the ending is one of files that hold many records."""
    return format_suffix(path) in RECORD_SUFFIXES


def read_text(path: Path) -> str:
    """Read a UTF-8 file, decompressed by its ending and without its byte order mark.

    Raises UserError for a file that cannot be read, and for an invalid byte, with its line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    content = _decompress(content, path).removeprefix(codecs.BOM_UTF8)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        kind = describe(content)
        bad_byte = f"{content[error.start]:#04x}" + (f": {kind}" if kind else "")
        raise UserError(f"{path}, line {line}: not UTF-8 (byte {bad_byte}); convert the file") from error


def _decompress(content: bytes, path: Path) -> bytes:
    compression = path.suffix.lower()
    try:
        if compression == ".gz":
            return gzip.decompress(content)
        if compression == ".bz2":
            return bz2.decompress(content)
        if compression == ".xz":
            return lzma.decompress(content)
        if compression == ".zst":
            import pyarrow  # comes with `datasets`; the standard library has zstd only from Python 3.14 on

            with pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd") as stream:
                return stream.read()
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        reason = str(error).strip().partition("\n")[0][:100] or type(error).__name__
        raise UserError(f"{path}: cannot be decompressed ({reason}); copy or compress the file again") from error
    return content


def describe(head: bytes) -> str | None:
    """Return the kind of a file by its first bytes, e.g. `a PDF document`; None if they match no known signature."""
    return next((kind for signature, kind in _SIGNATURES.items() if head.startswith(signature)), None)


def refuse(path: Path, head: bytes) -> UserError:
    """Return the error for a file that has none of the known endings. It names the file's kind and the supported formats."""
    kind = describe(head)
    remedy = "convert the file"
    if kind is None:
        kind = f"the ending {path.suffix} is not known" if path.suffix else "a file without an ending"
        remedy = "rename or convert the file"
    elif kind.endswith("-compressed"):
        remedy = "name it by its content, such as .jsonl.gz, or unpack it"
    return UserError(f"{path}: {kind}; what is read: {FORMATS}; {remedy}")
