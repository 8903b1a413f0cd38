"""A run folder as one archive: an uncompressed tar, in which files that checkpoints share are stored once, as hard links.

The first file in it is run.json, so that its format is checked before anything is unpacked. The last one is config.yaml,
without which a folder is no run: an archive that was cut off is not taken for a whole one.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dylora_mlx.errors import UserError
from dylora_mlx.run.run_folder import lock_run
from dylora_mlx.system.files import atomic_folder, atomic_write, check_output_file, check_run_parent, write_error
from dylora_mlx.system.run_format import check_format_of, check_run_folder
from dylora_mlx.training.checkpoint.links import link_or_copy

FIRST, LAST = "run.json", "config.yaml"
TEMPORARY = ("features", "experts")
"""Folders of a run that are made again when it resumes."""


def pack(run: Path, archive: Path) -> int:
    """Write a run folder to an archive, atomically. Returns the size of the archive in bytes.

    Raises UserError if there is no run, another process works on it, or the archive exists or cannot be written.
    """
    check_run_folder(run)
    if archive.exists():
        raise UserError(f"{archive}: exists already; choose another --out")
    check_output_file(archive)
    if archive.absolute().is_relative_to(run.absolute()):
        raise UserError(f"{archive}: inside the run folder; choose another --out")
    name = run.resolve().name
    with lock_run(run):
        try:
            with atomic_write(archive) as temporary:
                # PAX: sizes beyond 8 GB and names beyond 100 characters.
                with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
                    for path in _files(run):
                        tar.add(path, f"{name}/{path.relative_to(run).as_posix()}", recursive=False, filter=_anonymous)
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
        except OSError as error:
            raise write_error(archive, error, "choose another --out") from error
    return archive.stat().st_size


def _files(run: Path) -> Iterator[Path]:
    """Yield the files of a run: run.json, if there is one, all others, and config.yaml."""
    if (run / FIRST).is_file():
        yield run / FIRST
    for path in sorted(run.rglob("*")):
        parts = path.relative_to(run).parts
        is_temporary = parts[0] in TEMPORARY or any(part.startswith(".") for part in parts)
        if path.is_file() and not is_temporary and parts not in ((FIRST,), (LAST,)):
            yield path
    yield run / LAST


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave out who owns a file: the archive may go to others."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def unpack(archive: Path, folder: Path | None) -> Path:
    """Unpack an archive, atomically. Returns the run folder.

    Args:
        archive: a file that `pack` wrote.
        folder: the run folder to create; None for one of the packed run's name, in the current folder.

    Raises:
        UserError: the file is no such archive, is cut off, or is of a newer format; or the folder exists or cannot be
            created.
    """
    try:
        with tarfile.open(archive, "r:") as tar:
            members = tar.getmembers()
            name = _check_members(archive, members)
            _check_format(archive, tar, members)
            target = Path(name) if folder is None else folder
            if target.exists():
                raise UserError(f"{target}: exists already; choose another --out")
            check_run_parent(target)
            with atomic_folder(target) as temporary:
                for member in members:
                    _extract(tar, member, temporary)
    except tarfile.TarError as error:
        raise UserError(f"{archive}: not a whole archive of dylora pack ({error}); copy it again") from error
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or archive}: no such file") from error
    except OSError as error:
        raise write_error(Path(error.filename or archive), error, "choose another --out") from error
    return target


def _check_members(archive: Path, members: list[tarfile.TarInfo]) -> str:
    """Return the name of the run in an archive. Raises UserError unless all members are files of one folder, config.yaml last."""
    paths = [PurePosixPath(member.name) for member in members]
    name = paths[-1].parts[0] if paths and paths[-1].parts else ""
    for member, path in zip(members, paths, strict=True):
        links_out = member.islnk() and not _is_inside(PurePosixPath(member.linkname), name)
        if not (member.isreg() or member.islnk()) or not _is_inside(path, name) or links_out:
            raise UserError(
                f"{archive}: '{member.name[:80]}' is not a file of one run folder; this is no archive of dylora pack"
            )
    if not paths or paths[-1] != PurePosixPath(name, LAST):
        raise UserError(f"{archive}: its last file is not {LAST}, so it was cut off or is no archive of dylora pack")
    return name


def _is_inside(path: PurePosixPath, name: str) -> bool:
    """Return whether the path of a member is below the folder `name`."""
    return len(path.parts) > 1 and path.parts[0] == name and ".." not in path.parts and not path.is_absolute()


def _check_format(archive: Path, tar: tarfile.TarFile, members: list[tarfile.TarInfo]) -> None:
    """Raise UserError if the run was written by a newer version. A missing or damaged run.json is accepted, as in a folder."""
    file = tar.extractfile(members[0]) if PurePosixPath(members[0].name).name == FIRST else None
    try:
        info = json.loads(file.read()) if file is not None else None
    except (ValueError, RecursionError):
        return
    check_format_of(info, archive)


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Write one member below the folder, which stands for the run folder of the archive."""
    path = folder.joinpath(*PurePosixPath(member.name).parts[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    if member.islnk():
        link_or_copy(folder.joinpath(*PurePosixPath(member.linkname).parts[1:]), path)
        return
    source = tar.extractfile(member)
    assert source is not None, "a regular file has content"
    with source, path.open("xb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    os.utime(path, (member.mtime, member.mtime))
