"""Prompts of a file, and a file of the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dylora_mlx.data.readers import read_file
from dylora_mlx.data.records import Record
from dylora_mlx.errors import UserError
from dylora_mlx.generation.session import Session
from dylora_mlx.generation.stream import count_experts
from dylora_mlx.system import console
from dylora_mlx.system.files import write_text

COLUMN = "prompt"


def read_prompts(path: Path) -> list[Record]:
    """Return the records of a file, each with text in its column `prompt`. Raises UserError that names file and line."""
    records = read_file(path)
    for record in records:
        prompt = record.row.get(COLUMN)
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{record.location}: no text in the column '{COLUMN}'; each record needs a prompt")
    return records


def answer_file(session: Session, records: list[Record], out: Path | None) -> None:
    """Answer all records at once, and write a JSON line for each, in order, to `out`; to standard output for None.

    A line has the columns of its record, then text, experts, tokens and reason. Raises UserError for a prompt that does not
    fit the base's context.
    """
    for record in records:
        try:
            session.tokens(record.row[COLUMN])
        except UserError as error:
            raise UserError(f"{record.location}: {error}") from error
    with console.progress("prompts", len(records)) as progress:
        answers = session.answer_all([record.row[COLUMN] for record in records], progress.advance)
    lines = []
    for record, (text, expert_ids, summary) in zip(records, answers, strict=True):
        answer: dict[str, Any] = {"text": text, "experts": count_experts(session.names, expert_ids)}
        line = {**record.row, **answer, "tokens": summary.tokens, "reason": summary.reason}
        lines.append(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    if out is None:
        print("".join(lines), end="")
    else:
        write_text(out, "".join(lines))
