"""Check that every relative link and anchor in the repository's Markdown files exists.

    python tools/dev/check_links.py

The exit code is 1 if a link is broken.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub generates for the headings of a Markdown text."""
    headings = re.findall(r"^#+ +(.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def broken(path: Path) -> list[str]:
    """Return one line for each broken link of a file."""
    problems = []
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name) if name else path
        if not linked.exists():
            problems.append(f"{path}: {target} does not exist")
        elif anchor and anchor not in anchors(linked.read_text(encoding="utf-8")):
            problems.append(f"{path}: no heading for #{anchor} in {linked}")
    return problems


def main() -> int:
    listed = subprocess.run(["git", "ls-files", "*.md"], capture_output=True, text=True, check=True).stdout.split()
    problems = [line for name in listed for line in broken(Path(name))]
    print("\n".join(problems) or f"links in {len(listed)} Markdown files: all good")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
