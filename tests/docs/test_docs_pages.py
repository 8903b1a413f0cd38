"""The documentation outside code blocks: options in running text, quoted messages, the reference, drawings, links."""

from __future__ import annotations

import ast
import re
from functools import cache
from xml.etree import ElementTree

import pytest

from dylora_mlx.cli.commands import COMMANDS
from dylora_mlx.cli.options import parse_train
from tests.docs import documents
from tests.docs.documents import ROOT, Program, reference
from tests.exporting.mixtures import SCRIPTS, tool

NEEDS_TORCH = "pretrain_base.py"
"""A script that needs torch for its --help, so its options are unknown here and no page may name them."""
MLX_LM = ("mlx_lm.generate", "mlx_lm.lora", "mlx_lm.fuse")
"""Commands of mlx-lm whose options pages name."""
NOT_OURS = {"dylora: command not found": "the shell's", "device: cpu": "composed of two parts"}
"""Messages of docs/troubleshooting.md that are not in the package's source, with the reason."""
SVG = "{http://www.w3.org/2000/svg}"
SECTION = re.compile(
    r"(?:--)?(?P<name>(?:data|model|growth|training|log)(?:\.[a-z0-9_]+)+)(?:(?:: | |=)(?P<value>.+))?"
)


@cache
def options_of(name: str, *first: str) -> set[str]:
    """Return the options that a program accepts after these first arguments."""
    return {"--help", *documents.options(Program(name, list(first)))}


@cache
def options_of_all() -> set[str]:
    """Return every option that a `dylora` command, a tool, or a command of mlx-lm that pages name accepts."""
    paths = [path for folder in SCRIPTS for path in (ROOT / folder).glob("*.py") if path.name != NEEDS_TORCH]
    scripts = [documents.relative_path(path) for path in paths if "add_argument" in path.read_text(encoding="utf-8")]
    command_options = [options_of("dylora_mlx.__main__", name) for name in COMMANDS]
    return set().union(*command_options, *(options_of(name) for name in (*scripts, *MLX_LM)))


def unknown(span: str) -> list[str]:
    """Return the parts of an inline code span that do not exist: config options, commands, and options of commands."""
    words, option_match = span.split(), SECTION.fullmatch(span)
    if option_match:
        exists = any(f"{name}.".startswith(f"{option_match['name']}.") for name in reference.options())
        return [] if exists else [span]
    if words[0].startswith("--"):
        return [word for word in words if word.startswith("--") and word.partition("=")[0] not in options_of_all()]
    program = documents.program(words) if len(words) > 1 else None
    if program is None:
        return []
    name, argv = program
    if name == "dylora_mlx.__main__" and argv and re.fullmatch("[a-z-]+", argv[0]):
        if argv[0] not in COMMANDS:
            return [span]
        accepted = options_of(name, argv[0])
    else:
        accepted = options_of(name)
    return [word for word in argv if word.startswith("--") and word.partition("=")[0] not in accepted]


@pytest.mark.parametrize("page", documents.PAGES, ids=documents.relative_path)
def test_options_in_backticks_exist(page):
    assert not [part for span in documents.spans(page) for part in unknown(span)]


@pytest.mark.parametrize("page", documents.PAGES, ids=documents.relative_path)
def test_values_in_backticks_are_accepted(page, tmp_path):
    (tmp_path / "any.yaml").write_text("skills: [{name: any, source: any.jsonl}]")
    matches = filter(None, map(SECTION.fullmatch, documents.spans(page)))
    values = {(match["name"], match["value"]) for match in matches if match["value"]}
    for name, value in values:  # one at a time: two of them may exclude each other
        assert parse_train(["--config", str(tmp_path / "any.yaml"), f"--{name}", value]).config


@pytest.mark.parametrize(
    "span",
    [
        "growth.tresh", "--growth.tresh", "training.epoch: 3", "growth.probe.step", "--show-expert", "dylora fuze", "dylora fuse --temp",
        "dylora explain --quiet RUN", "python -m dylora_mlx.evaluate runs/my --show-experts", "dylora export --fmt",
    ],
)  # fmt: skip
def test_what_does_not_exist_would_be_found(span):
    assert unknown(span)


def test_quoted_messages_are_in_the_source():
    """Every message that begins a symptom is in the source, apart from its numbers, names and ellipses."""
    page = " ".join((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").split())
    quoted = {
        span for bold in re.findall(r"\*\*(.+?)\*\*", page) for span in re.findall("`(.+?)`", bold)
    } - NOT_OURS.keys()
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "dylora_mlx").rglob("*.py"))
    source = re.sub(r'"\s*f?"', "", source)  # join string literals that continue on the next line
    parts = {part.strip() for span in quoted for part in re.split(r"\d+|'\w+'|\.\.\.|nan\b", span)}
    assert len(quoted) > 20
    assert not [part for part in parts if len(part) > 5 and part not in source]


def test_the_reference_is_up_to_date(capsys):
    assert reference.main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_reference_is_reported(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(reference, "ROOT", tmp_path)
    monkeypatch.setattr(reference, "OUT", tmp_path / "docs" / "reference.md")
    assert reference.main(["--check"]) == 1
    assert capsys.readouterr().err == "docs/reference.md is stale: run python tools/dev/write_reference.py\n"
    assert reference.main([]) == 0
    assert reference.main(["--check"]) == 0


def test_the_reference_has_every_option_and_command():
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert not [name for name in reference.options() if f"| `{name}` |" not in page]
    assert not [name for name in COMMANDS if f"### dylora {name}\n" not in page]


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "drawings").glob("*.svg")), ids=documents.relative_path)
def test_drawings(path):
    """Each drawing is well-formed XML, has a title, links to nothing, and is shown on a page."""
    root = ElementTree.parse(path).getroot()
    assert root.tag == f"{SVG}svg"
    assert root.findtext(f"{SVG}title")
    assert not [name for part in root.iter() for name in part.attrib if name.endswith("href")]
    assert any(f"(drawings/{path.name})" in page.read_text(encoding="utf-8") for page in documents.PAGES)


@pytest.mark.parametrize("page", documents.PAGES, ids=documents.relative_path)
def test_links_lead_somewhere(page):
    assert not tool("check_links").broken(page)


def test_places_in_the_code_exist():
    """docs/architecture.md names files, and functions and classes in them."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    places = re.findall(r"`((?:[a-z_]+/)*[a-z0-9_]+\.py)(?::([\w.]+))?`", text.replace("path.py:name", ""))
    assert len(places) > 50
    for file, name in places:
        path = next((path for path in (ROOT / "dylora_mlx" / file, ROOT / file) if path.is_file()), None)
        assert path is not None, file
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert {part for part in name.split(".") if part} <= defined, f"{file}:{name}"


def test_the_index_has_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert not [name for name in pages if f"({name})" not in index]
