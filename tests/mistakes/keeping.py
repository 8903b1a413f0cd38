"""Mistakes with commands that keep a run: prune and pack, and checkpoints that are not there any more."""

from __future__ import annotations

import io
import json
import tarfile

from tests.mistakes.rows import FINAL, Damage, Mistake, chain, delete, edit, no_steps, setting, truncate, write

PRUNE = [
    ("", "run"),
    ("nosuch", "nosuch: no run here"),
    ("mixture", "mixture: no run here"),
    ("run --keep 0", "--keep 0 is not at least 1"),
    ("run --keep all", "--keep"),
    ("run --max-bytes much", "--max-bytes much: not a size; write it as 500MB"),
    ("run --max-bytes 0", "--max-bytes 0: not a size"),
    ("run --max-bytes -1GB", "--max-bytes"),
    ("run --dryrun", "unrecognized arguments: --dryrun"),
    ("run/checkpoints/final", ("a checkpoint, not a run folder; give the run folder, ", "run, which has final, step-")),
]
PACK = [
    ("", "give a run folder to pack, or an archive with --unpack"),
    ("run --unpack run.tar", "give a run folder to pack, or an archive with --unpack"),
    ("nosuch", "nosuch: no run here"),
    ("notes.jsonl", "notes.jsonl: no run here"),
    ("mixture", "mixture: no run here"),
    ("run --out notes.jsonl", "notes.jsonl: exists already"),
    ("run --out nosuch/run.tar", "nosuch is not a writable folder"),
    ("run --out run/run.tar", "run/run.tar: inside the run folder"),
    ("--unpack nosuch.tar", "nosuch.tar: no such file"),
    ("--unpack notes.jsonl", "notes.jsonl: not a whole archive of dylora pack"),
    ("--unpack run", "run: "),
]


def archive(name: str, *names: str, info: dict | None = None) -> Damage:
    """Write a tar of small files, and of a run.json if `info` is its content."""
    contents = dict.fromkeys(names, b"skills: []\n")
    if info is not None:
        contents = {"made/run.json": json.dumps(info).encode(), **contents}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, data in contents.items():
            member = tarfile.TarInfo(path)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return write(name, buffer.getvalue())


UNPACK = "--unpack made.tar"
ARCHIVES = [
    (
        archive("made.tar", "made/config.yaml", info={"format": 99, "dylora_mlx": "9.8"}),
        ("format 99", "install dylora_mlx 9.8"),
    ),
    (archive("made.tar", "made/samples.json", info={"format": 1}), "its last file is not config.yaml"),
    (archive("made.tar"), "it was cut off or is no archive of dylora pack"),
    (archive("made.tar", "config.yaml"), "'config.yaml' is not a file of one run folder"),
    (archive("made.tar", "/made/config.yaml"), "is not a file of one run folder"),
    (archive("made.tar", "made/../config.yaml"), "is not a file of one run folder"),
    (archive("made.tar", "made/a.json", "other/config.yaml"), "'made/a.json' is not a file of one run folder"),
    (
        chain(archive("made.tar", "made/config.yaml"), write("made/notes", "")),
        "made: exists already; choose another --out",
    ),
    (chain(archive("made.tar", "made/config.yaml"), *[truncate("made.tar")] * 5), "made.tar: "),
]
GONE = "run/checkpoints/step-000002"
ROWS = [
    *(Mistake("prune", argv, message) for argv, message in PRUNE),
    Mistake("prune", "run", "another process works on this run", locked=True),
    Mistake("prune", "run", "no complete checkpoint, so none is removed", chain(no_steps, truncate(f"{FINAL}/router.safetensors"))),
    Mistake("prune", "run", "no complete checkpoint, so none is removed: there is none", delete("run/checkpoints")),
    Mistake("prune", "run --keep 1", "format 99", edit(f"{FINAL}/MANIFEST.json", setting(format=99))),
    *(Mistake("pack", argv, message) for argv, message in PACK),
    Mistake("pack", "run", "another process works on this run", locked=True),
    *(Mistake("pack", UNPACK, message, damage) for damage, message in ARCHIVES),
    Mistake("train", f"--resume {GONE}", (f"{GONE}: this checkpoint is not there, or not any more", "run, which has final, step-")),
    Mistake("train", f"--resume {FINAL}", f"{FINAL}: a checkpoint, not a run folder; give the run folder, "),
    Mistake("generate", f"{GONE} --prompt a", "this checkpoint is not there, or not any more"),
]  # fmt: skip
