"""Files to documents of some 60 to 400 tokens: functions and classes of Python, declarations, paragraphs."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

SHORTEST, LONGEST = 250, 1400
"""Characters of a document; a token of code is some 3.5 of them."""
NOTICE = re.compile(r"copyright|licen[sc]ed? |all rights reserved|\bSPDX-", re.I)


class Definition(NamedTuple):
    """A function, a class, or a method with the head of its class; and the names that it uses."""

    head: str
    text: str
    names: frozenset[str]


def python(source: str) -> Iterator[str]:
    """Functions and classes, each with the imports that it uses, so that it can be read by itself.

    Of a class that is too long, the methods, below the class's head. Short neighbours are joined. Docstrings keep
    their first line: a page of prose above some code is another kind of text. Tables and other top-level statements are
    left out, and so is a file that does not parse.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    imports = _imports(tree.body)
    for found in _merged(_definitions(tree.body, _summarised(tree, source.splitlines(keepends=True)))):
        used = dict.fromkeys(line for name, line in imports.items() if name in found.names)
        yield _head("".join(used) + ("\n\n" if used else "") + found.head + found.text)


def _summarised(tree: ast.Module, lines: list[str]) -> list[str]:
    """The lines, of every docstring only the first; lines that go become empty, so that the numbers stay."""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or not ast.get_docstring(node):
            continue
        first, last = node.body[0].lineno - 1, node.body[0].end_lineno or 0
        if last - first > 1 and lines[first].lstrip()[:1] in "rRuU\"'":
            summary = str(ast.get_docstring(node)).partition("\n")[0]
            lines[first:last] = [f'{" " * node.body[0].col_offset}"""{summary}"""\n', *[""] * (last - first - 1)]
    return lines


def _imports(body: Iterable[ast.stmt]) -> dict[str, str]:
    """The line that binds each imported name, also below a try or an if."""
    found = {}
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):
            found |= _imports(node.body)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                name = (alias.asname or alias.name).partition(".")[0]
                one = (
                    ast.Import([alias])
                    if isinstance(node, ast.Import)
                    else ast.ImportFrom(node.module, [alias], node.level)
                )
                found[name] = ast.unparse(one) + "\n"
    return found


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
    """Join neighbours of one class, or of none, until they are long enough; what stays too short is left out."""
    run = Definition("", "", frozenset())
    for found in definitions:
        same = run.text and run.head == found.head
        run = Definition(run.head, f"{run.text}\n{found.text}", run.names | found.names) if same else found
        if len(run.text) >= SHORTEST:
            yield run
            run = Definition("", "", frozenset())


def paragraphs(source: str) -> Iterator[str]:
    """Runs of blocks that blank lines divide, without copyright notices."""
    return _joined(block for block in _blocks(source) if not NOTICE.search(block))


def notices(source: str) -> Iterator[str]:
    """Paragraphs of a licence, its notices included."""
    return _joined(_blocks(source))


def _blocks(source: str) -> list[str]:
    return [block.rstrip() + "\n" for block in re.split(r"\n\s*\n", source.replace("\r\n", "\n")) if block.strip()]


def _joined(texts: Iterable[str]) -> Iterator[str]:
    """Join neighbours until they are long enough, and keep the beginning of what is too long."""
    run = ""
    for text in texts:
        run = f"{run}\n{text}" if run else text
        if len(run) >= SHORTEST:
            yield _head(run)
            run = ""


def _head(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    end = text.rfind("\n", 0, LONGEST)
    return text[: end + 1 if end >= SHORTEST else LONGEST]


def readable(text: str) -> bool:
    """Whether a document is text or code rather than a table or something that a machine wrote."""
    letters = sum(c.isalpha() or c.isspace() for c in text)
    return len(text) >= SHORTEST and letters > 0.6 * len(text) and max(map(len, text.splitlines())) < 200


def squeezed(text: str) -> str:
    """A text without its white space, to find documents that are there twice."""
    return re.sub(r"\s+", "", text)
