"""Folders of text: which of their files are documents, and which are left out for which reason."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import pathspec

from dylora_mlx.data.files import TEXT_SUFFIXES
from dylora_mlx.errors import UserError

SKIPPED_FOLDERS = {
    "node_modules", "bower_components", "jspm_packages", "site-packages", "dist-packages", "venv", "virtualenv",
    "__pycache__", "__pypackages__", "build", "_build", "dist", "target", "htmlcov", "Pods", "DerivedData",
}  # fmt: skip
"""Folders of dependencies and of built files, by name. Names that begin with a dot are skipped anyway."""
_SKIPPED_ENDINGS = (".egg-info", ".dist-info")
_MARKERS = {
    "pyvenv.cfg": "", "conda-meta": "", "CACHEDIR.TAG": "", "modules.txt": "vendor", "autoload.php": "vendor",
}  # fmt: skip
"""Files that mark their folder as one of dependencies or a cache, and the name that the folder must have, if any."""
_ASTERISKS = re.compile(r"(?<!\\)\*{2,}")


@dataclass
class FolderFiles:
    """The text files of a folder."""

    files: list[Path] = field(default_factory=list)
    """In the order of their paths."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of files and links that were left out, by reason."""


class Patterns:
    """The include and exclude options of a source. Raises UserError for an invalid pattern."""

    def __init__(self, include: Sequence[str] | None, exclude: Sequence[str] | None):
        self._include = _compile("include", include) if include else None
        self._exclude = _compile("exclude", exclude) if exclude else None
        parts = [PurePosixPath(pattern.lstrip("!")).parts for pattern in include or () if not pattern.startswith("!")]
        self._named = {part for pattern in parts for part in pattern}
        self._named_suffixes = {PurePosixPath(pattern[-1]).suffix.lower() for pattern in parts if pattern}

    def includes(self, path: str) -> bool:
        """Return whether a file, by its path in the folder, matches `include`, or there is none."""
        return self._include is None or self._include.match_file(path)

    def excludes(self, path: str) -> bool:
        """Return whether a file, or a folder by its path with a slash at its end, matches `exclude`."""
        return self._exclude is not None and self._exclude.match_file(path)

    def names(self, name: str) -> bool:
        """Return whether a pattern of `include` has this file's or folder's name as one of its parts: it is wanted although
        it would be left out."""
        return name in self._named

    def names_suffix(self, name: str) -> bool:
        """Return whether a pattern of `include` ends in this file's ending or names the file."""
        return name in self._named or PurePosixPath(name).suffix.lower() in self._named_suffixes - {""}


def _simplify(pattern: str) -> str:
    """Return a pattern with one asterisk for several that mean the same: as a regular expression each would multiply the time."""
    return "/".join(part if part == "**" else _ASTERISKS.sub("*", part) for part in pattern.split("/"))


def _compile(option: str, patterns: Sequence[str]) -> pathspec.GitIgnoreSpec:
    try:
        return pathspec.GitIgnoreSpec.from_lines([_simplify(pattern.removeprefix("./")) for pattern in patterns])
    except (ValueError, re.error) as error:
        raise UserError(f"{option}: {error}; a pattern is written as in a .gitignore, such as '*.py'") from error


def list_text_files(folder: Path, patterns: Patterns, count_left_out: bool = True) -> FolderFiles:
    """List the text files of a folder and its subfolders.

    Left out are hidden files and folders, folders of dependencies and of built files, what the folder's own .gitignore files
    name, links, and what `patterns` leaves out. Raises UserError for a folder that cannot be read.

    Args:
        count_left_out: whether to look into folders that are left out, to count their text files.
    """
    listing = FolderFiles()
    pending: list[tuple[Path, str, list[_GitIgnore]]] = [(folder, "", [])]
    while pending:
        current, prefix, ignores = pending.pop()
        entries = _entries(current)
        if any(entry.name == ".gitignore" and entry.is_file() for entry in entries):
            ignores = [*ignores, _GitIgnore(current / ".gitignore", prefix)]
        for entry in entries:
            path = f"{prefix}{entry.name}"
            if entry.is_symlink():
                reason = "links" if entry.is_dir() or _is_text(entry.name) else ""
                listing.left_out[reason] += 1
            elif entry.is_dir(follow_symlinks=False):
                reason = _folder_reason(entry, path, ignores, patterns)
                if reason is None:
                    pending.append((Path(entry.path), f"{path}/", ignores))
                elif count_left_out:
                    listing.left_out[reason] += sum(_is_text(name) for name in _all_names(entry.path))
            elif entry.is_file(follow_symlinks=False):
                reason = _file_reason(entry.name, path, ignores, patterns)
                if reason is None:
                    listing.files.append(Path(entry.path))
                else:
                    listing.left_out[reason] += 1
    del listing.left_out[""]
    listing.left_out = +listing.left_out  # without the zeros
    listing.files.sort()
    return listing


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error


def _folder_reason(entry: os.DirEntry[str], path: str, ignores: Sequence[_GitIgnore], patterns: Patterns) -> str | None:
    """Return why a folder is left out, None if it is not."""
    if patterns.excludes(f"{path}/"):
        return "by exclude"
    if patterns.names(entry.name):
        return None
    if entry.name.startswith(".") or entry.name in SKIPPED_FOLDERS or entry.name.endswith(_SKIPPED_ENDINGS):
        return f"in {entry.name}"
    for marker, name in _MARKERS.items():
        if name in ("", entry.name) and os.path.exists(os.path.join(entry.path, marker)):
            return f"in {entry.name}"
    return "by .gitignore" if _is_ignored(f"{path}/", ignores) else None


def _file_reason(name: str, path: str, ignores: Sequence[_GitIgnore], patterns: Patterns) -> str | None:
    """Return why a file is left out: an empty text for one that nobody expects to be read, None if it is a document."""
    if not _is_text(name) and not patterns.names_suffix(name):
        return "" if name.startswith(".") else "with other endings"
    if patterns.excludes(path):
        return "by exclude"
    if not patterns.includes(path):
        return "not in include"
    if patterns.names(name):
        return None
    if name.startswith("."):
        return "hidden"
    return "by .gitignore" if _is_ignored(path, ignores) else None


def _is_text(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in TEXT_SUFFIXES


def _all_names(folder: str) -> Iterator[str]:
    """Yield the names of all files below a folder. Links are not followed, and folders that cannot be read are passed over."""
    for _, _, names in os.walk(folder):
        yield from names


class _GitIgnore:
    """A .gitignore file. Lines that are no patterns are passed over, as git does."""

    def __init__(self, path: Path, prefix: str):
        self.prefix = prefix
        lines = []
        try:
            text = path.read_text("utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        for line in map(_simplify, text.replace("\r\n", "\n").split("\n")):
            try:
                pathspec.GitIgnoreSpec.from_lines([line])
            except (ValueError, re.error):
                continue
            lines.append(line)
        self._spec = pathspec.GitIgnoreSpec.from_lines(lines)

    def verdict(self, path: str) -> bool | None:
        """Return whether a path of the source's folder is ignored, None if no line matches it."""
        return self._spec.check_file(path.removeprefix(self.prefix)).include


def _is_ignored(path: str, ignores: Sequence[_GitIgnore]) -> bool:
    """Return whether a file, or a folder with a slash at its end, is ignored. The innermost .gitignore with a match decides."""
    verdicts = (ignore.verdict(path) for ignore in reversed(ignores))
    return next((verdict for verdict in verdicts if verdict is not None), False)
