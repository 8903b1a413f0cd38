"""Near-duplicates of documents: other text of what a person would call the same skill."""

from __future__ import annotations

import ast
import builtins
import io
import keyword
import re
import tokenize
import warnings

import numpy as np

VARIANTS = ("identifiers", "comments", "lines")
"""Kinds of near-duplicates: bound names are renamed, comments are stripped, or lines are moved between documents."""
FEWEST = 0.25
"""Minimum share of documents that a change must affect."""
SWAPPED = 0.2
"""Share of the lines that change places, between all documents."""
_COMMENT = re.compile(r"(?<![:\w\"'])(//|--)[^\n]*|/\*.*?\*/|<!--.*?-->", re.S)


def varied(texts: list[str], variant: str, rng: np.random.Generator) -> list[str]:
    """Return the documents of a shard, changed in one of the VARIANTS.

    If the change affects fewer than FEWEST of them, lines are moved instead.
    """
    variants = texts
    if variant == "identifiers":
        bound = [_bound(text) for text in texts]
        pool = sorted(set().union(*bound))
        variants = [_renamed(text, sorted(names), pool, rng) for text, names in zip(texts, bound, strict=True)]
    elif variant == "comments":
        variants = [_uncommented(text) for text in texts]
    changed = sum(new != old for new, old in zip(variants, texts, strict=True))
    return variants if changed >= FEWEST * len(texts) else _shuffled(texts, rng)


def _bound(text: str) -> set[str]:
    """Return the names that a document binds: functions, classes, parameters and variables.

    Attributes are part of an interface and keep their names, as do dunder names, builtins and keywords.
    """
    nodes = _nodes(text)
    names = {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))}
    names |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    names |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names -= {"self", "cls", *keyword.kwlist, *dir(builtins)}
    return {name for name in names if not name.startswith("__")}


def _renamed(text: str, names: list[str], pool: list[str], rng: np.random.Generator) -> str:
    """Replace every bound name by a name from the shard with the same capitalisation, or by a numbered one."""
    new: dict[str, str] = {}
    for name in names:
        used = {*names, *new.values()}
        fitting = [other for other in pool if other not in used and other[0].isupper() == name[0].isupper()]
        new[name] = str(rng.choice(fitting)) if fitting else f"{name}_{len(new)}"
    if not new:
        return text
    words = "|".join(map(re.escape, names))
    return re.sub(rf"(?<![\w.\"'])({words})(?![\w\"'])", lambda match: new[match.group()], text)


def _uncommented(text: str) -> str:
    """Strip comments: of Python with its tokenizer, of other text with a pattern for C, SQL and HTML comments."""
    if not _nodes(text):
        stripped = _COMMENT.sub("", text)
        return stripped if len(stripped.split()) >= 5 else text
    lines: list[str | None] = [*text.splitlines()]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, offset = token.start
            lines[row - 1] = token.line[:offset].rstrip() or None
    return "".join(f"{line}\n" for line in lines if line is not None)


def _nodes(text: str) -> list[ast.AST]:
    """Return the nodes of the syntax tree; none if the text is not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in third-party strings
            return list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError):
        return []


def _shuffled(texts: list[str], rng: np.random.Generator) -> list[str]:
    """Permute a random share of all lines."""
    lines = [text.splitlines() for text in texts]
    places = [
        (i, j)
        for i, document_lines in enumerate(lines)
        for j in range(len(document_lines))
        if document_lines[j].strip()
    ]
    chosen = [places[k] for k in np.flatnonzero(rng.random(len(places)) < SWAPPED)]
    moved = [lines[i][j] for i, j in chosen]
    for (i, j), k in zip(chosen, rng.permutation(len(moved)), strict=True):
        lines[i][j] = moved[k]
    return ["\n".join(document_lines) + "\n" for document_lines in lines]
