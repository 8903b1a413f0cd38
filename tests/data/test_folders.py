"""Folders of text: what is a document, what is left out, and that this is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dylora_mlx.config import DataConfig, Source
from dylora_mlx.data import cache, skills
from dylora_mlx.errors import UserError
from dylora_mlx.model.base.tokenizer import Tokenizer
from tests.data.sources import complaint, files_of, read, rows_of


def fill(folder: Path, *names: str) -> Path:
    """Write files whose text is their name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    return folder


def paths_of(folder: Path, **options) -> set[str]:
    found = rows_of(read(folder, **options))
    assert all(row["text"] == f"# {row['path']}\n" for row in found)
    return {row["path"] for row in found}


OWN = {"a.py", "b.py", "docs/c.md", "docs/deep/d.PY", "src/E.MD", "environment/f.py", "built/g.py"}


@pytest.mark.parametrize(
    "name",
    [
        ".git/hooks/x.py", ".venv/lib/x.py", ".tox/x.py", ".mypy_cache/x.py", "src/.hidden/x.md", "node_modules/p/x.js",
        "web/node_modules/p/x.ts", "venv/lib/x.py", "__pycache__/x.py", "lib/site-packages/p/x.py", "build/lib/x.py",
        "dist/x.js", "target/debug/x.rs", "p.egg-info/x.txt", "docs/_build/x.txt", "htmlcov/x.js", "Pods/x.swift",
    ],
)  # fmt: skip
def test_hidden_dependency_and_built_folders_are_left_out(tmp_path, name):
    fill(tmp_path, *OWN, name, f"{name}.txt")
    assert paths_of(tmp_path) == OWN
    reason = f"in {next(part for part in Path(name).parts if part not in ('src', 'web', 'lib', 'docs'))}"
    info = read(tmp_path).info
    assert info.left_out == {reason: 2}
    assert info.files_note("mine") == f"mine: 7 files (.py 5, .md 2); left out: 2 {reason}"


def test_notes_are_text_by_any_of_their_endings(tmp_path):
    fill(tmp_path, "a.md", "b.markdown", "c.rst", "d.txt", "e.pdf")
    assert paths_of(tmp_path) == {"a.md", "b.markdown", "c.rst", "d.txt"}


@pytest.mark.parametrize(
    ("marker", "folder"),
    [("pyvenv.cfg", "env"), ("pyvenv.cfg", "my-python"), ("conda-meta/history", "env"), ("CACHEDIR.TAG", "pages"),
     ("modules.txt", "vendor"), ("autoload.php", "vendor")],
)  # fmt: skip
def test_a_folder_of_dependencies_is_known_by_what_is_in_it(tmp_path, marker, folder):
    fill(tmp_path, *OWN, f"{folder}/x.py")
    assert paths_of(tmp_path) == {*OWN, f"{folder}/x.py"}
    (tmp_path / folder / marker).parent.mkdir(exist_ok=True)
    (tmp_path / folder / marker).touch()
    assert paths_of(tmp_path) == OWN
    assert read(tmp_path).info.left_out == {f"in {folder}": 1 + marker.endswith(".txt")}


def test_gitignore_files_are_followed(tmp_path):
    fill(tmp_path, *OWN, "a.log.py", "gen/x.py", "docs/gen/y.md", "docs/deep/keep.md", "docs/deep/drop.md", "top/b.py")
    (tmp_path / ".gitignore").write_text("# comment\n*.log.py\ngen/\n/b.py\n\\\n!\ndrop*\n\n")
    (tmp_path / "docs" / "deep" / ".gitignore").write_text("*.md\r\n!keep.md\r\n")
    (tmp_path / "src" / ".gitignore").write_text("/a.py\n")
    assert paths_of(tmp_path) == (OWN | {"docs/deep/keep.md", "top/b.py"}) - {"b.py"}
    assert read(tmp_path).info.left_out == {"by .gitignore": 5}


def test_an_inner_gitignore_file_may_take_back_what_an_outer_one_ignores(tmp_path):
    fill(tmp_path, *OWN, "docs/kept.txt", "dropped.txt")
    (tmp_path / ".gitignore").write_text("*.txt\n")
    (tmp_path / "docs" / ".gitignore").write_text("!*.txt\n")
    assert paths_of(tmp_path) == OWN | {"docs/kept.txt"}


def test_a_gitignore_file_above_the_folder_is_none_of_its_own(tmp_path):
    fill(tmp_path / "data" / "scripts", *OWN)
    (tmp_path / ".gitignore").write_text("data/\n")
    assert paths_of(tmp_path / "data" / "scripts") == OWN


def test_the_folder_itself_may_have_any_name(tmp_path):
    for name in (".notes", "build", "node_modules", "venv"):
        assert paths_of(fill(tmp_path / name, *OWN)) == OWN


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*.md"], None, {"docs/c.md"}),  # patterns tell capitals apart, as git does
        (["*.[mM][dD]"], None, {"docs/c.md", "src/E.MD"}),
        (["docs"], None, {"docs/c.md", "docs/deep/d.PY"}),
        (["docs/", "/a.py"], None, {"docs/c.md", "docs/deep/d.PY", "a.py"}),
        (["./docs/**", "!*.PY"], None, {"docs/c.md"}),
        (None, ["docs/"], OWN - {"docs/c.md", "docs/deep/d.PY"}),
        (None, ["*.py", "*.PY"], {"docs/c.md", "src/E.MD"}),
        (None, ["*.py", "!a.py", "docs/"], {"a.py", "src/E.MD"}),
        (["*.py"], ["b.*", "environment"], {"a.py", "built/g.py"}),
        (["*.toml", "*.md"], None, {"docs/c.md", "pyproject.toml"}),
        (["Makefile", "a.py", "b.py"], None, {"Makefile", "a.py", "b.py"}),
        (["build/**", "a.py", "b.py"], None, {"build/x.py", "a.py", "b.py"}),
        ([".github", "a.py", "b.py"], None, {".github/ci.md", "a.py", "b.py"}),
        (["ignored.py", "a.py", "b.py"], None, {"ignored.py", "a.py", "b.py"}),
    ],
)
def test_patterns_choose_files(tmp_path, include, exclude, expected):
    fill(tmp_path, *OWN, "pyproject.toml", "Makefile", "build/x.py", "build/y.txt.in", ".github/ci.md", "ignored.py")
    (tmp_path / ".gitignore").write_text("ignored.py\n")
    source = Source(name="s", source=str(tmp_path), include=include, exclude=exclude)
    found = skills.source_files(source)
    assert found is not None
    assert {path.relative_to(tmp_path).as_posix() for path in found} == expected
    if len(expected) > 2:
        assert paths_of(tmp_path, include=include, exclude=exclude) == expected


def test_what_patterns_leave_out_is_counted(tmp_path):
    fill(tmp_path, *OWN, "pyproject.toml", "setup.cfg", "tests/x.py", "tests/y.py", "z.txt")
    info = read(tmp_path, include=["*.py", "*.PY"], exclude=["tests/"]).info
    assert info.left_out == {"not in include": 3, "by exclude": 2, "with other endings": 2}
    assert info.files == {".py": 5}
    note = "s: 5 files (.py 5); left out: 3 not in include, 2 by exclude, 2 with other endings"
    assert sorted(info.files_note("s")) == sorted(note)


def test_patterns_that_leave_nothing_are_refused(tmp_path):
    fill(tmp_path, *OWN)
    assert "no text file is left of this folder by include and exclude" in complaint(tmp_path, include=["*.rs"])
    assert "left out: 7 not in include" in complaint(tmp_path, include=["*.rs"])
    assert "no text file is left of this folder" in complaint(tmp_path, exclude=["*"])
    with pytest.raises(
        UserError, match=r"include: Invalid git pattern: 'a\\\\'; a pattern is written as in a .gitignore"
    ):
        read(tmp_path, include=["a\\"])


@pytest.mark.parametrize("patterns", [[], [""], [" "], ["/"], ["!"], ["../x.py"], ["a/../../b"], ["~/x.py"]])
@pytest.mark.parametrize("name", ["include", "exclude"])
def test_what_is_no_pattern_is_refused_by_the_config(name, patterns):
    with pytest.raises(ValueError, match=f"{name}: .* of skill 's' is not a list of patterns of files in a folder"):
        Source(name="s", source="x", **{name: patterns})


def test_a_pattern_of_many_asterisks_takes_no_time(tmp_path):
    fill(tmp_path, *OWN)
    many = "*" * 60 + "@" + "**" * 30
    (tmp_path / ".gitignore").write_text(f"{many}\n**/docs/***\n\\**.py\n")
    assert paths_of(tmp_path, exclude=[many]) == OWN - {"docs/c.md", "docs/deep/d.PY"}


def test_links_are_not_followed_and_counted(tmp_path):
    fill(tmp_path / "other", "x.py", "y.py")
    folder = fill(tmp_path / "folder", *OWN)
    (folder / "file.py").symlink_to(tmp_path / "other" / "x.py")
    (folder / "gone.md").symlink_to("nowhere.md")
    (folder / "subfolder").symlink_to(tmp_path / "other")
    (folder / "loop").symlink_to(folder)
    (folder / "picture.png").symlink_to("nowhere.png")
    assert paths_of(folder) == OWN
    assert read(folder).info.left_out == {"links": 4}
    (tmp_path / "link").symlink_to(folder)
    assert paths_of(tmp_path / "link") == OWN  # the source itself may be one


def test_empty_and_other_files_are_counted(tmp_path):
    fill(tmp_path, *OWN, "picture.png", "Makefile", ".hidden.py", ".gitattributes")
    (tmp_path / "empty.py").write_text(" \n\t")
    os.mkfifo(tmp_path / "pipe.py")
    info = read(tmp_path).info
    assert info.left_out == {"with other endings": 2, "hidden": 1, "empty": 1}
    assert info.split_origins == {
        "train": "7 files of text", "validation": "drawn from train", "test": "drawn from train",
    }  # fmt: skip
    assert files_of(tmp_path) == sorted([*(Path(name).name for name in OWN), "empty.py"])


def test_nothing_is_said_where_nothing_was_left_out(tmp_path):
    assert read(fill(tmp_path, *OWN)).info.files_note("s") is None


def test_one_file_left_out_is_one(tmp_path):
    fill(tmp_path, "a.py", "b.py", "c.py", "x.toml")
    (tmp_path / "d.py").symlink_to("a.py")
    note = read(tmp_path).info.files_note("s")
    assert note is not None
    assert note.startswith("s: 3 files (.py 3); left out: ")
    assert sorted(note.partition("left out: ")[2].split(", ")) == ["1 link", "1 with another ending"]


def test_a_file_that_is_not_utf8_is_an_error_unless_it_is_left_out(tmp_path):
    fill(tmp_path, *OWN)
    (tmp_path / "latin.py").write_bytes(b"x = 1\n# caf\xe9\n")
    assert f"{tmp_path / 'latin.py'}, line 2: not UTF-8 (byte 0xe9); convert the file" in complaint(tmp_path / ".")
    assert paths_of(tmp_path, exclude=["latin.py"]) == OWN
    (tmp_path / ".gitignore").write_text("latin.*\n")
    assert paths_of(tmp_path) == OWN


def test_a_folder_deeper_than_the_recursion_limit_is_read(tmp_path):
    deep = tmp_path
    for _ in range(120):
        deep = deep / "d"
    assert len(paths_of(fill(tmp_path, *OWN, f"{'d/' * 120}x.py"))) == 8


def test_folders_that_cannot_be_listed_are_named(tmp_path, monkeypatch):
    fill(tmp_path, *OWN)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("docs"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"{tmp_path / 'docs'}: cannot be read (Permission denied)" in complaint(tmp_path / ".")


def test_only_files_that_are_read_count_for_the_cache(tmp_path, base_tokenizer):
    fill(tmp_path, *OWN, ".venv/x.py")

    def key(**options) -> str | None:
        return cache.cache_key(Source(name="s", source=str(tmp_path), **options), DataConfig(), base_tokenizer, 0)

    before = key()
    fill(tmp_path, ".venv/y.py", "node_modules/x.js", "picture.png")
    (tmp_path / "link.py").symlink_to("a.py")
    assert key() == before is not None
    (tmp_path / ".gitignore").write_text("b.py\n")
    ignored = key()
    (tmp_path / ".gitignore").unlink()
    assert key() == before
    assert len({before, ignored, key(include=["*.py"]), key(exclude=["b.py"])}) == 4


def test_what_is_left_out_is_counted_anew_when_the_documents_come_from_the_cache(tmp_path):
    fill(tmp_path, *OWN, ".venv/x.py")
    (tmp_path / "empty.md").touch()
    source = Source(name="s", source=str(tmp_path))
    info = skills.read_source(source, DataConfig(), 0).info
    assert info.left_out == {"in .venv": 1, "empty": 1}
    fill(tmp_path, ".venv/y.py", "node_modules/z.js")
    now = skills.current_info(source, info)
    assert now.left_out == {"in .venv": 2, "empty": 1, "in node_modules": 1}
    assert (now.files, now.records) == (info.files, info.records)


@pytest.fixture(scope="module")
def base_tokenizer() -> Tokenizer:
    return Tokenizer(skills.assets.BASE)
