"""Near-duplicates of documents: the same skill as a person sees it, in other words."""

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
"""What a document binds has other names; comments are stripped; lines are moved between documents."""
FEWEST = 0.25
"""Share of the documents that a change must reach."""
SWAPPED = 0.2
"""Share of the lines that move to another document."""
_COMMENT = re.compile(r"(?<![:\w\"'])(//|--)[^\n]*|/\*.*?\*/|<!--.*?-->", re.S)


def varied(texts: list[str], variant: str, rng: np.random.Generator) -> list[str]:
    """The documents of a shard, changed in one of the VARIANTS; its lines are moved where few have what that changes."""
    found = texts
    if variant == "identifiers":
        bound = [_bound(text) for text in texts]
        pool = sorted(set().union(*bound))
        found = [_renamed(text, sorted(names), pool, rng) for text, names in zip(texts, bound, strict=True)]
    elif variant == "comments":
        found = [_uncommented(text) for text in texts]
    changed = sum(new != old for new, old in zip(found, texts, strict=True))
    return found if changed >= FEWEST * len(texts) else _shuffled(texts, rng)


def _bound(text: str) -> set[str]:
    """The names that a document itself binds: functions, classes, parameters, variables; attributes are an interface."""
    nodes = _nodes(text)
    names = {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))}
    names |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    names |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names -= {"self", "cls", *keyword.kwlist, *dir(builtins)}
    return {name for name in names if not name.startswith("__")}


def _renamed(text: str, names: list[str], pool: list[str], rng: np.random.Generator) -> str:
    """Give every bound name another one of the same form, that some other document of the shard uses."""
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
    if not _nodes(text):
        stripped = _COMMENT.sub("", text)
        return stripped if len(stripped.split()) >= 5 else text
    lines: list[str | None] = [*text.splitlines()]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, expert_id = token.start
            lines[row - 1] = token.line[:expert_id].rstrip() or None
    return "".join(f"{line}\n" for line in lines if line is not None)


def _nodes(text: str) -> list[ast.AST]:
    """The syntax tree's nodes; none of what is not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            return list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError):
        return []


def _shuffled(texts: list[str], rng: np.random.Generator) -> list[str]:
    """A share of all lines, at random, changes places."""
    lines = [text.splitlines() for text in texts]
    places = [(i, j) for i, found in enumerate(lines) for j in range(len(found)) if found[j].strip()]
    chosen = [places[k] for k in np.flatnonzero(rng.random(len(places)) < SWAPPED)]
    moved = [lines[i][j] for i, j in chosen]
    for (i, j), k in zip(chosen, rng.permutation(len(moved)), strict=True):
        lines[i][j] = moved[k]
    return ["\n".join(found) + "\n" for found in lines]
