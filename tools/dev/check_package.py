"""Build the wheel and the source archive, and check what they hold.

    python tools/dev/check_package.py              builds in a temporary folder
    python tools/dev/check_package.py --out dist   keeps both files, in an empty or new folder

The wheel must hold every tracked file of dylora_mlx/ and configs/ and nothing else, and the source archive every tracked file but
those of CI. Prints the sizes. The exit code is 1 if a file is missing, superfluous, or an archive too large. Needs `build` and git.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
MAX_BYTES = 12_000_000
"""Largest size of either archive."""
NOT_IN_SDIST = (".ci/", ".github/", ".pre-commit-config.yaml")
"""Beginnings of tracked paths that the source archive leaves out: they serve the repository alone."""
GENERATED = {"PKG-INFO"}
"""Files that the build adds to the source archive."""


class Archive(NamedTuple):
    """A built archive: its file, and the paths in it as in the repository."""

    path: Path
    names: set[str]


def read_wheel(path: Path) -> Archive:
    """Return the files of a wheel without those of its metadata folder."""
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if not PurePosixPath(name).parts[0].endswith(".dist-info")}
    configs = "dylora_mlx/configs/"
    return Archive(
        path, {f"configs/{name.removeprefix(configs)}" if name.startswith(configs) else name for name in names}
    )


def read_sdist(path: Path) -> Archive:
    """Return the files of a source archive, relative to its folder."""
    with tarfile.open(path) as sdist:
        names = {PurePosixPath(*PurePosixPath(m.name).parts[1:]).as_posix() for m in sdist.getmembers() if m.isfile()}
    return Archive(path, names - GENERATED)


def differences(archive: Archive, wanted: Iterable[str]) -> list[str]:
    """Return one line for each file that is missing or superfluous, and one if the archive is too large."""
    wanted, name, size = set(wanted), archive.path.name, archive.path.stat().st_size
    lines = [f"{name}: {path} is missing" for path in sorted(wanted - archive.names)]
    lines += [f"{name}: {path} does not belong here" for path in sorted(archive.names - wanted)]
    if size > MAX_BYTES:
        lines.append(f"{name}: {size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:g}")
    return lines


def in_wheel(tracked: Iterable[str]) -> list[str]:
    """Return the tracked files that the wheel must hold."""
    return [path for path in tracked if path.startswith(("dylora_mlx/", "configs/"))]


def in_sdist(tracked: Iterable[str]) -> list[str]:
    """Return the tracked files that the source archive must hold."""
    return [path for path in tracked if not path.startswith(NOT_IN_SDIST)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to keep both archives in (default: none)")
    out = parser.parse_args(argv).out
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        print(f"error: {out}: exists already and is not an empty folder; choose another --out", file=sys.stderr)
        return 2
    # A new file counts before it is committed, as the build takes it too.
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    tracked = [path for path in tracked if (ROOT / path).is_file()]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if out is None else out
        if subprocess.run(
            [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], stdout=sys.stderr
        ).returncode:
            return 1
        wheel, sdist = read_wheel(next(folder.glob("*.whl"))), read_sdist(next(folder.glob("*.tar.gz")))
        for archive in (wheel, sdist):
            size = archive.path.stat().st_size
            print(f"{archive.path.name}: {len(archive.names)} files, {size / 1e6:.2f} MB")
        problems = differences(wheel, in_wheel(tracked)) + differences(sdist, in_sdist(tracked))
    print("\n".join(problems) or "both hold what they need and no more")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
