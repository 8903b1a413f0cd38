"""Pages of the documentation site that are not in docs/: a hook of mkdocs.yml.

The README is the first page; the changelog, CONTRIBUTING, SECURITY and the notebook have pages of their own; the API reference
has an entry for each public name of the package. Links between these files are rewritten to the site's pages.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/walkthrough.ipynb": "walkthrough.ipynb",
}
"""Page of the site by file of the repository. Files in docs/ keep their names."""
INDEX = "docs/README.md"
"""The index of docs/ for readers of the repository: the site has its navigation instead, so links to it lead to the first page."""
LINK = re.compile(r"(\]\()([^)\s]+)(\))")


UNLINKED = "no-page"
"""Target of links that are taken away: only their text stays."""


def page_of(target: str) -> str | None:
    """Return the site's page of a path in the repository, None for a file that has none, such as a program."""
    if target in ("docs", INDEX):
        return "index.md"
    return PAGES.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)


def rewrite(text: str, source: str) -> str:
    """Return a page's text with its relative links led to the site's pages. A link to a file without a page becomes its text.

    Args:
        text: Markdown.
        source: path of the file in the repository.
    """

    def link(match: re.Match[str]) -> str:
        path, hash_mark, anchor = match[2].partition("#")
        if re.match(r"[a-z]+:", path) or not path:
            return match[0]
        target = page_of(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)))
        if target is None:
            return "](" + UNLINKED + ")"
        here = page_of(source) or source
        return f"]({posixpath.relpath(target, posixpath.dirname(here) or '.')}{hash_mark}{anchor})"

    fenced = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    parts = [part if number % 2 else LINK.sub(link, part) for number, part in enumerate(fenced)]
    return re.sub(r"\[([^\]]*)\]\(" + re.escape(UNLINKED) + r"\)", r"\1", "".join(parts))


def public_names() -> list[str]:
    """Return the names of `dylora_mlx.__all__` with their modules, read from the source: nothing is imported."""
    tree = ast.parse((ROOT / "dylora_mlx/__init__.py").read_text(encoding="utf-8"))
    assigned = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    homes = ast.literal_eval(assigned["_HOMES"])
    return [f"{homes[name]}.{name}" for name in ast.literal_eval(assigned["__all__"]) if name in homes]


def api_page() -> str:
    """Return the page of the Python interface: functions first, then classes."""
    names = sorted(public_names(), key=lambda name: (name.rpartition(".")[2][0].isupper(), name))
    entries = "\n".join(f"::: {name}\n" for name in names)
    return f"# Python interface\n\nEverything here is imported from `dylora_mlx` itself, as in `dylora_mlx.load(...)`.\n\n{entries}"


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/. An event of mkdocs."""
    from mkdocs.structure.files import File  # imported here: tests of the links need no mkdocs

    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=rewrite(text, source)))
    files.append(File.generated(config, "api.md", content=api_page()))
    return files


on_files.mkdocs_priority = 100  # type: ignore[attr-defined]  # before the plugin for notebooks, which turns files into pages


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of pages in docs/; those of PAGES are rewritten already. An event of mkdocs."""
    name = page.file.src_uri
    return markdown if name in {*PAGES.values(), "api.md"} else rewrite(markdown, f"docs/{name}")
