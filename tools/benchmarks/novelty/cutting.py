"""Cut files into documents of some 60 to 400 tokens: Python functions and classes, declarations, paragraphs."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

SHORTEST, LONGEST = 250, 1400
"""Minimum and maximum characters per document; a token of code has about 3.5 characters."""
NOTICE = re.compile(r"copyright|licen[sc]ed? |all rights reserved|\bSPDX-", re.I)
"""Matches blocks with a copyright notice."""


class Definition(NamedTuple):
    """A function, a class or a method."""

    head: str
    """Head of the class of a method; empty otherwise."""
    text: str
    names: frozenset[str]
    """Names that it uses."""


def python(source: str) -> Iterator[str]:
    """Yield functions and classes, each with the imports that it uses, so that it can be read alone.

    A class longer than LONGEST yields its methods, each below the head of the class. Short neighbours are merged.
    Docstrings keep only their first line, since long prose is another kind of text than code. Tables and other
    top-level statements are left out, and so is a file that does not parse.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in third-party strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    imports = _imports(tree.body)
    for definition in _merged(_definitions(tree.body, _summarised(tree, source.splitlines(keepends=True)))):
        used_imports = dict.fromkeys(line for name, line in imports.items() if name in definition.names)
        yield _head("".join(used_imports) + ("\n\n" if used_imports else "") + definition.head + definition.text)


def _summarised(tree: ast.Module, lines: list[str]) -> list[str]:
    """Return the lines with every docstring reduced to its first line.

    Removed lines become empty, so that the line numbers of the syntax tree stay valid.
    """
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or not ast.get_docstring(node):
            continue
        first, last = node.body[0].lineno - 1, node.body[0].end_lineno or 0
        if last - first > 1 and lines[first].lstrip()[:1] in "rRuU\"'":
            summary = str(ast.get_docstring(node)).partition("\n")[0]
            lines[first:last] = [f'{" " * node.body[0].col_offset}"""{summary}"""\n', *[""] * (last - first - 1)]
    return lines


def _imports(body: Iterable[ast.stmt]) -> dict[str, str]:
    """Return the import statement of each imported name, also from within `try` and `if`."""
    lines_by_name = {}
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):
            lines_by_name |= _imports(node.body)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                name = (alias.asname or alias.name).partition(".")[0]
                statement = (
                    ast.Import([alias])
                    if isinstance(node, ast.Import)
                    else ast.ImportFrom(node.module, [alias], node.level)
                )
                lines_by_name[name] = ast.unparse(statement) + "\n"
    return lines_by_name


def _definitions(body: list[ast.stmt], lines: list[str], head: str = "") -> Iterator[Definition]:
    for node in body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        text = "".join(lines[first : node.end_lineno]).rstrip() + "\n"
        if isinstance(node, ast.ClassDef) and len(text) > LONGEST and not head:
            bases = ", ".join(map(ast.unparse, node.bases))
            yield from _definitions(
                node.body, lines, f"class {node.name}({bases}):\n" if bases else f"class {node.name}:\n"
            )
        else:
            names = frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name))
            yield Definition(head, text, names)


def _merged(definitions: Iterable[Definition]) -> Iterator[Definition]:
    """Merge neighbours with the same head until they have SHORTEST characters; drop a remainder that is too short."""
    merged = Definition("", "", frozenset())
    for definition in definitions:
        same_class = merged.text and merged.head == definition.head
        merged = (
            Definition(merged.head, f"{merged.text}\n{definition.text}", merged.names | definition.names)
            if same_class
            else definition
        )
        if len(merged.text) >= SHORTEST:
            yield merged
            merged = Definition("", "", frozenset())


def paragraphs(source: str) -> Iterator[str]:
    """Yield documents of blocks separated by blank lines, without copyright notices."""
    return _joined(block for block in _blocks(source) if not NOTICE.search(block))


def notices(source: str) -> Iterator[str]:
    """Yield documents of a licence, including its copyright notices."""
    return _joined(_blocks(source))


def _blocks(source: str) -> list[str]:
    return [block.rstrip() + "\n" for block in re.split(r"\n\s*\n", source.replace("\r\n", "\n")) if block.strip()]


def _joined(texts: Iterable[str]) -> Iterator[str]:
    """Join neighbours until they have SHORTEST characters, and cut what exceeds LONGEST."""
    joined = ""
    for text in texts:
        joined = f"{joined}\n{text}" if joined else text
        if len(joined) >= SHORTEST:
            yield _head(joined)
            joined = ""


def _head(text: str) -> str:
    """Cut a text at LONGEST characters, if possible at the end of a line."""
    if len(text) <= LONGEST:
        return text
    end = text.rfind("\n", 0, LONGEST)
    return text[: end + 1 if end >= SHORTEST else LONGEST]


def readable(text: str) -> bool:
    """Return whether a document is text or code, not a table or generated data."""
    letters = sum(c.isalpha() or c.isspace() for c in text)
    return len(text) >= SHORTEST and letters > 0.6 * len(text) and max(map(len, text.splitlines())) < 200


def squeezed(text: str) -> str:
    """Return a text without white space, as a key to find duplicates."""
    return re.sub(r"\s+", "", text)
