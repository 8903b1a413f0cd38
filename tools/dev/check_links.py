"""Check that every relative link and anchor in the repository's Markdown files leads somewhere.

python tools/dev/check_links.py
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a Markdown text's headings."""
    headings = re.findall(r"^#+ +(.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def broken(path: Path) -> list[str]:
    """One line for each link of a file that leads nowhere."""
    found = []
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        other = (path.parent / name) if name else path
        if not other.exists():
            found.append(f"{path}: {target} leads nowhere")
        elif anchor and anchor not in anchors(other.read_text(encoding="utf-8")):
            found.append(f"{path}: no heading for #{anchor} in {other}")
    return found


def main() -> int:
    listed = subprocess.run(["git", "ls-files", "*.md"], capture_output=True, text=True, check=True).stdout.split()
    problems = [line for name in listed for line in broken(Path(name))]
    print("\n".join(problems) or f"links in {len(listed)} Markdown files: all good")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
