"""Layout of a local source: the files of its splits, a data set saved to disk, or a folder of text files."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dylora_mlx.config import Source
from dylora_mlx.data import files, folders, split_files
from dylora_mlx.data.folders import Patterns
from dylora_mlx.errors import UserError

_PATTERN = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Layout:
    """The files of a local source, and how they are to be read."""

    root: Path
    """Folder that the files' names are relative to; the file itself for a source of one file."""
    splits: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    """Files of records by split. One file, or files without split names, are the split train."""
    texts: list[Path] | None = None
    """Text files, one document each, if the source is a folder of text."""
    saved: list[Path] | None = None
    """Files of a folder that `save_to_disk` of the package `datasets` wrote."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Files and links that were left out of a folder of text, by reason."""

    @property
    def files(self) -> list[Path]:
        """All files that are read."""
        of_splits = [path for paths in self.splits.values() for path in paths]
        return [*of_splits, *(self.texts or ()), *(self.saved or ())]

    def by_ending(self) -> dict[str, int]:
        """Return how many files are read of each ending, the most frequent first."""
        readable = [path for path in self.files if self.saved is None or path.suffix == ".arrow"]
        return dict(Counter(files.ending(path) for path in readable).most_common())

    def name(self, path: Path) -> str:
        """Return a file's name inside the source."""
        return path.name if path == self.root else path.relative_to(self.root).as_posix()


def is_pattern(source: str) -> bool:
    """Return whether a source's name is a pattern such as `data/*.jsonl`."""
    return _PATTERN.search(source) is not None


def pattern_root(source: str) -> Path:
    """Return the folder before a pattern's first part with a wildcard."""
    parts = Path(os.path.expanduser(source)).parts
    return Path(*parts[: next(i for i, part in enumerate(parts) if is_pattern(part))])


def describe(source: Source, root: Path, count_left_out: bool = True) -> Layout:
    """Return the layout of a local source.

    Raises UserError if there is nothing to read, for two sets of files of one split, and for `include` or `exclude` of a
    source that is one file.

    Args:
        root: the existing file or folder of the source; a pattern's folder.
        count_left_out: whether to count the files in folders that are left out, which takes time.
    """
    patterns = Patterns(source.include, source.exclude)
    if root.is_dir():
        if is_pattern(source.source) and not Path(os.path.expanduser(source.source)).exists():
            return _of_pattern(source, root, patterns)
        return _of_folder(source, root, patterns, count_left_out)
    if source.include is not None or source.exclude is not None:
        raise UserError(f"{source.source}: include and exclude choose files of a folder, and this is one file")
    require_train_split(source)
    return Layout(root, {"train": (root,)})


def require_train_split(source: Source) -> None:
    """Raise UserError if a source without splits is configured with a split other than train."""
    if source.split != "train":
        raise UserError(f"{source.source}: has no split '{source.split}', it is one file or folder without splits")


def _of_pattern(source: Source, root: Path, patterns: Patterns) -> Layout:
    matches = glob.glob(str(Path(os.path.expanduser(source.source))), recursive=True)
    paths = [path for path in sorted(map(Path, matches)) if path.is_file() and _is_wanted(path, root, patterns)]
    if not paths:
        raise UserError(f"{source.source}: no file matches this pattern (skill '{source.name}')")
    texts = [path for path in paths if files.format_suffix(path) in files.TEXT_SUFFIXES]
    splits = split_files.find(paths, source.split)
    num_named = sum(map(len, splits.values()))
    if split_files.training_split(splits, source.split) is not None and num_named == len(paths):
        return Layout(root, splits)
    require_train_split(source)
    if not texts:
        return Layout(root, {"train": tuple(paths)})
    if len(texts) < len(paths):
        other = next(path for path in paths if path not in set(texts))
        raise UserError(
            f"{source.source}: matches text, {texts[0].name}, and other files, {other.name}; write a pattern for one of them"
        )
    return Layout(root, texts=texts)


def _of_folder(source: Source, folder: Path, patterns: Patterns, count_left_out: bool) -> Layout:
    saved = _saved_files(folder)
    if saved is not None:
        if source.include is not None or source.exclude is not None:
            raise UserError(f"{source.source}: include and exclude choose files, and this is a saved data set")
        return Layout(folder, saved=saved)
    named: dict[str, tuple[Path, ...]] = {}
    for splits in _splits_of_folder(folder, source.split, patterns):
        if split_files.training_split(splits, source.split) is not None:
            return Layout(folder, splits)
        named = named or splits
    texts = folders.list_text_files(folder, patterns, count_left_out)
    if named and (not texts.files or source.split != "train"):
        # The training file would have the ending of the others.
        ending = files.ending(next(iter(named.values()))[0])
        return Layout(folder, named | {source.split: (folder / f"{source.split}{ending}",)})
    if texts.files:
        require_train_split(source)
    return Layout(folder, texts=texts.files, left_out=texts.left_out)


def _saved_files(folder: Path) -> list[Path] | None:
    """Return the files of a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote; None for another one."""
    if (folder / "dataset_dict.json").is_file():
        return sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".arrow") and path.is_file())
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return sorted(path for path in folder.iterdir() if path.suffix in (".json", ".arrow") and path.is_file())
    return None


def _splits_of_folder(folder: Path, wanted: str, patterns: Patterns) -> Iterator[dict[str, tuple[Path, ...]]]:
    """Yield the split files in each place where a folder may have them: in itself; then, if it has no text of its own, in a
    subfolder `data`, and in subfolders that are named by split."""
    top_files = [path for path in _list_files(folder) if _is_wanted(path, folder, patterns)]
    texts = [path for path in top_files if files.format_suffix(path) in files.TEXT_SUFFIXES and not _is_about(path)]
    # In a folder of documents or of a program, train.txt is a document like the others.
    are_splits = all(path.suffix.lower() == ".txt" and split_files.find([path], wanted) for path in texts)
    yield split_files.find((path for path in top_files if files.is_record_file(path) or are_splits), wanted)
    if texts:
        return

    def record_files(subfolder: Path) -> list[Path]:
        if subfolder.is_symlink() or not subfolder.is_dir():
            return []
        return [p for p in _list_files(subfolder) if files.is_record_file(p) and _is_wanted(p, folder, patterns)]

    yield split_files.find(record_files(folder / "data"), wanted)
    yield split_files.find_folders(
        {path.name: record_files(path) for path in sorted(folder.iterdir()) if path.is_dir()}, folder, wanted
    )


def _is_about(path: Path) -> bool:
    """Return whether a file is a readme or a license, which describes a folder and is not one of its documents."""
    return path.name.lower().startswith(("readme", "license", "licence"))


def _list_files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error


def _is_wanted(path: Path, root: Path, patterns: Patterns) -> bool:
    name = path.relative_to(root).as_posix()
    return patterns.includes(name) and not patterns.excludes(name)
