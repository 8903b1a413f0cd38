"""Read one file as records: JSON lines, JSON, CSV and long texts by our own code, which changes no value, tables by `datasets`."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dylora_mlx.data import files
from dylora_mlx.data.records import Record
from dylora_mlx.errors import UserError

TEXT_DOCUMENT = 2000
"""Characters of a document that is cut from a long text, at most: about as many tokens as a default row holds."""
_COLUMNS_OF_CHATS = ("messages", "conversations", "tools")
"""Columns whose value is a list of objects and yet no list of records."""
_NEEDED = 'an array of objects, or an object with one list of objects such as {"data": [...]}'


def read_file(path: Path) -> list[Record]:
    """Read a file as records, in order, by its ending.

    A file of text is cut into documents, see `cut`. A file of an unknown ending that begins as JSON does is read as JSON.
    Raises UserError that names the file, and the line or record where there is one.
    """
    suffix = files.format_suffix(path)
    if suffix in files.TABLE_SUFFIXES:
        from dylora_mlx.data import tables  # imports `datasets`, which most sources do not need

        records = tables.read_table(path, suffix)
    else:
        if suffix is None:
            suffix = _guess(path)
        records = _READERS[suffix](path)
    if not records:
        raise UserError(f"{path}: the file has no records")
    return records


def _guess(path: Path) -> str:
    """Return the ending that a file of an unknown one should have. Raises UserError unless it holds JSON."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    start = b"" if files.describe(head) else head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if start == b"{":
        return ".jsonl"
    if start == b"[":
        return ".json"
    raise files.refuse(path, head)


def read_json_lines(path: Path) -> list[Record]:
    """Read a file with one JSON object per line. Empty lines are skipped."""
    return _json_lines(files.read_text(path), path)


def _json_lines(text: str, path: Path) -> list[Record]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            hint = "; a file with one JSON array ends in .json" if number == 1 and line.strip() == "[" else ""
            raise UserError(
                f"{path}, line {number}: not JSON ({_json_reason(error)}); every line must be one JSON object{hint}"
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, line {number}: a JSON {type(row).__name__}, but every line must be one JSON object"
            )
        rows.append(Record(row, f"{path}, line {number}"))
    return rows


def _json_reason(error: ValueError | RecursionError) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", "a number too long")


def read_json_records(path: Path) -> list[Record]:
    """Read a JSON array of objects, an object with one list of objects, or JSON lines in a file that is named .json."""
    text = files.read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not text.strip() or _is_json_object(text.strip().partition("\n")[0]):
            return _json_lines(text, path)
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}{line}: not JSON ({_json_reason(error)}); needed is {_NEEDED}") from error
    rows = []
    for number, row in enumerate(_list_of_records(value, path), 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, record {number}: a JSON {type(row).__name__}, but every record must be an object")
        rows.append(Record(row, f"{path}, record {number}"))
    return rows


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _list_of_records(value: Any, path: Path) -> list[Any]:
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON {type(value).__name__}; needed is {_NEEDED}")
    lists = {
        name: inner
        for name, inner in value.items()
        if isinstance(inner, list) and name not in _COLUMNS_OF_CHATS and any(isinstance(row, dict) for row in inner)
    }
    if not lists:
        raise UserError(f"{path}: a JSON object without a list of records; needed is {_NEEDED}")
    if len(lists) > 1:
        raise UserError(
            f"{path}: a JSON object with several lists of records ({', '.join(lists)}); write each to a file of its own"
        )
    return next(iter(lists.values()))


def read_csv(path: Path) -> list[Record]:
    """Read a table of text with a header. Every value stays the text that it is: `007`, `1.10`, `NA` and the empty cell.

    The columns are divided by tabs in a .tsv file, else by commas, or by semicolons or tabs if the header has no comma.
    """
    text = files.read_text(path)
    header_line = text.partition("\n")[0]
    delimiter = "\t" if files.format_suffix(path) == ".tsv" else ","
    if delimiter == "," and "," not in header_line:
        delimiter = next((other for other in ";\t" if other in header_line), ",")
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))  # one cell may hold a whole document
    rows, header, last_line = [], None, 0
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        place = f"{path}, line {last_line + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return rows
        except csv.Error as error:
            raise UserError(
                f"{place}: not CSV ({error}); quote a text that holds a quote, a line break or the delimiter"
            ) from error
        last_line = reader.line_num
        if not cells or (len(cells) == 1 and not cells[0].strip() and header is not None and len(header) > 1):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            twice = next((name for name in header if header.count(name) > 1), None)
            if twice is not None:
                raise UserError(f"{place}: two columns are called '{twice}'; the first line must name the columns")
            continue
        if len(cells) != len(header):
            raise UserError(
                f"{place}: {len(cells)} fields, but the first line names {len(header)} columns ({', '.join(header)}); "
                "quote a text that holds the delimiter"
            )
        rows.append(Record(dict(zip(header, cells, strict=True)), place))


def read_long_text(path: Path) -> list[Record]:
    """Read one file of text as documents of whole paragraphs, see `cut`."""
    return [Record({"text": text}, f"{path}, line {line}") for line, text in cut(files.read_text(path))]


def cut(text: str, size: int = TEXT_DOCUMENT) -> list[tuple[int, str]]:
    """Cut a text at blank lines into documents of at most `size` characters, each with the number of its first line.

    Paragraphs are packed greedily, in order, and stand in a document as in the text. Only a paragraph longer than `size` is
    cut inside: at the end of a line, else of a sentence, else of a word.
    """
    spans = [part for start, end in _paragraphs(text) for part in _parts(text, start, end, size)]
    documents: list[list[int]] = []
    for start, end in spans:
        if documents and end - documents[-1][0] <= size:
            documents[-1][1] = end
        else:
            documents.append([start, end])
    numbered_texts, line, position = [], 1, 0
    for start, end in documents:
        line += text.count("\n", position, start)
        position = start
        numbered_texts.append((line, text[start:end]))
    return numbered_texts


def _paragraphs(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each group of lines that are not blank, without the last line's break."""
    start, end, position = None, 0, 0
    for line in text.split("\n"):
        if line.strip():
            start = position if start is None else start
            end = position + len(line.rstrip("\r"))
        elif start is not None:
            yield start, end
            start = None
        position += len(line) + 1
    if start is not None:
        yield start, end


def _parts(text: str, start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a paragraph, each at most `size` long."""
    while end - start > size:
        at = _last_break(text, start, start + size)
        if not text[start:at].isspace():
            yield start, at
        next_word = next((i for i in range(at, end) if not text[i].isspace()), end)
        start = text.rfind("\n", at, next_word) + 1 or next_word  # a line keeps its indentation
    if start < end:
        yield start, end


def _last_break(text: str, start: int, stop: int) -> int:
    """Return where to cut text[start:stop]: after the last line, sentence or word of its second half, else at `stop`."""
    half = (start + stop) // 2
    for mark in ("\n", ". ", "! ", "? ", " "):
        at = text.rfind(mark, half, stop + 1)
        if at > start:
            return at + len(mark.rstrip())
    return stop


_READERS: dict[str, Callable[[Path], list[Record]]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json_records,
    ".csv": read_csv,
    ".tsv": read_csv,
    **dict.fromkeys(files.TEXT_SUFFIXES, read_long_text),
}
