"""Check that a tag names the version that is released: in the package, CITATION.cff and the changelog, which dates it.

    python tools/dev/check_release.py v0.1.0

The exit code is 1, with a line on each place, if they disagree.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACES = {
    "dylora_mlx/__init__.py": r'^__version__ = "(.+)"$',
    "CITATION.cff": r"^version: (.+)$",
    "CHANGELOG.md": r"^## (\S+), \d{4}-\d{2}-\d{2}$",
}
"""Pattern of the version in each file: the first match counts, in the changelog the first version that has a date."""


def disagreements(tag: str, root: Path) -> list[str]:
    """Return one line for each file that has another version than the tag, or none."""
    lines = []
    for name, pattern in PLACES.items():
        match = re.search(pattern, (root / name).read_text(encoding="utf-8"), re.M)
        version = match[1] if match else "no version, or none with a date"
        if f"v{version}" != tag:
            lines.append(f"{name}: {version}, but the tag is {tag}")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tag", help="tag of the release, such as v0.1.0")
    lines = disagreements(parser.parse_args(argv).tag, ROOT)
    print("\n".join(lines) or "the tag, the package, CITATION.cff and the changelog agree")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
