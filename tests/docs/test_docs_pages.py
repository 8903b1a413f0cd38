"""What the documentation says besides commands: options in running text, the reference, drawings, links."""

from __future__ import annotations

import re
from functools import cache
from xml.etree import ElementTree

import pytest

from dylora_mlx.cli.options import parse_train
from tests.docs import documents
from tests.docs.documents import ROOT, Program, reference
from tests.exporting.mixtures import SCRIPTS, tool

NEEDS_TORCH = "pretrain_base.py"
"""To begin with: no page may name its options."""
NOT_OURS = {"dylora: command not found": "the shell's", "device: cpu": "made of two parts"}
"""Messages of docs/troubleshooting.md that are not to be found in the package, with the reason."""
SVG = "{http://www.w3.org/2000/svg}"
SECTION = re.compile(
    r"(?:--)?(?P<name>(?:data|model|growth|training|log)(?:\.[a-z0-9_]+)+)(?:(?:: | |=)(?P<value>.+))?"
)


@cache
def options_of(name: str, *first: str) -> set[str]:
    return {"--help", *documents.options(Program(name, list(first)))}


@cache
def options_of_all() -> set[str]:
    """Every option that a command of ours, a tool or mlx_lm.generate takes."""
    paths = [path for folder in SCRIPTS for path in (ROOT / folder).glob("*.py") if path.name != NEEDS_TORCH]
    scripts = [documents.named(path) for path in paths if "add_argument" in path.read_text(encoding="utf-8")]
    ours = [options_of("dylora_mlx.__main__", name) for name in reference.commands()]
    return set().union(*ours, *(options_of(name) for name in (*scripts, "mlx_lm.generate")))


def unknown(span: str) -> list[str]:
    """What stands in backticks and does not exist: an option of a config, a command, an option of one or of any."""
    words, named = span.split(), SECTION.fullmatch(span)
    if named:
        known = any(f"{name}.".startswith(f"{named['name']}.") for name in reference.options())
        return [] if known else [span]
    if words[0].startswith("--"):
        return [word for word in words if word.startswith("--") and word.partition("=")[0] not in options_of_all()]
    program = documents.program(words) if len(words) > 1 else None
    if program is None:
        return []
    name, argv = program
    if name == "dylora_mlx.__main__" and argv and re.fullmatch("[a-z-]+", argv[0]):
        if argv[0] not in reference.commands():
            return [span]
        taken = options_of(name, argv[0])
    else:
        taken = options_of(name)
    return [word for word in argv if word.startswith("--") and word.partition("=")[0] not in taken]


@pytest.mark.parametrize("page", documents.PAGES, ids=documents.named)
def test_options_in_backticks_exist(page):
    assert not [what for span in documents.spans(page) for what in unknown(span)]


@pytest.mark.parametrize("page", documents.PAGES, ids=documents.named)
def test_values_in_backticks_are_taken(page, tmp_path):
    (tmp_path / "any.yaml").write_text("skills: [{name: any, source: any.jsonl}]")
    found = filter(None, map(SECTION.fullmatch, documents.spans(page)))
    given = {(match["name"], match["value"]) for match in found if match["value"]}
    for name, value in given:  # one by one: two of them may exclude each other
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


def test_quoted_messages_are_the_programs_own():
    """Every message that a symptom begins with, but for its numbers, names and what is left out."""
    page = " ".join((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").split())
    quoted = {
        span for bold in re.findall(r"\*\*(.+?)\*\*", page) for span in re.findall("`(.+?)`", bold)
    } - NOT_OURS.keys()
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "dylora_mlx").rglob("*.py"))
    source = re.sub(r'"\s*f?"', "", source)  # strings that go on in the next line
    parts = {part.strip() for span in quoted for part in re.split(r"\d+|'\w+'|\.\.\.|nan\b", span)}
    assert len(quoted) > 20
    assert not [part for part in parts if len(part) > 5 and part not in source]


def test_the_reference_is_up_to_date(capsys):
    assert reference.main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_reference_is_said_so(tmp_path, monkeypatch, capsys):
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
    assert not [name for name in reference.commands() if f"### dylora {name}\n" not in page]


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "drawings").glob("*.svg")), ids=documents.named)
def test_drawings(path):
    """Well-formed, with a title, without anything from elsewhere, and shown on a page."""
    root = ElementTree.parse(path).getroot()
    assert root.tag == f"{SVG}svg"
    assert root.findtext(f"{SVG}title")
    assert not [name for part in root.iter() for name in part.attrib if name.endswith("href")]
    assert any(f"(drawings/{path.name})" in page.read_text(encoding="utf-8") for page in documents.PAGES)


@pytest.mark.parametrize("page", documents.PAGES, ids=documents.named)
def test_links_lead_somewhere(page):
    assert not tool("check_links").broken(page)


def test_the_index_has_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert not [name for name in pages if f"({name})" not in index]
