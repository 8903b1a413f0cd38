"""What happened to whom: experts by number in order of creation, whatever column they had at a time, and who serves what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dylora_mlx.growth.decide.decision_log import NOT_ARRIVALS
from dylora_mlx.reporting.records import Records, losses, number

MOST = 10_000
"""Columns of a pool at most: a record that says more is damaged, and drawn of nothing."""


@dataclass
class Phase:
    """Steps start to end that an expert spent in one phase: young, warming, mature, refined or undone."""

    start: float
    end: float
    kind: str
    skill: str


@dataclass
class Expert:
    """One expert's life. number: in order of creation, from 1; ended: how (merged, evicted) and at which step."""

    number: int
    name: str
    born: float
    phases: list[Phase] = field(default_factory=list)
    ended: tuple[str, float] | None = None
    imported: bool = False


@dataclass
class Moment:
    """A metric record, and the numbers of the experts that its columns stand for."""

    step: float
    record: dict[str, Any]
    columns: tuple[int, ...]


@dataclass
class History:
    """experts: by number, from 1; moments: metric records in order; starts: (step, skill) of every arrival;
    serving: the expert of each skill, 0 for the base; base: what the base itself knew, of which a domain is made."""

    experts: list[Expert] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    starts: list[tuple[float, str]] = field(default_factory=list)
    serving: dict[str, int] = field(default_factory=dict)
    columns: list[int] = field(default_factory=lambda: [0])
    last: float = 0.0

    def label(self, expert: int) -> str:
        """An expert's number and name, as legends have it."""
        return f"{expert} {self.experts[expert - 1].name}" if 0 < expert <= len(self.experts) else "base"

    def apply(self, decision: dict[str, Any], step: float) -> None:
        """Change the pool as a decision did."""
        action, column = decision["action"], decision.get("expert")
        if action in ("merge", "evict"):
            if decision.get("kept"):
                self._remove(decision, step)
            return
        if type(column) is not int or not 0 <= column <= MOST:
            return
        while len(self.columns) <= column:
            self._born(decision["skill"], step).imported = action == "import"
        self.serving[decision["skill"]] = self.columns[column]

    def _born(self, name: str, step: float) -> Expert:
        made = Expert(len(self.experts) + 1, name, step)
        self.experts.append(made)
        self.columns.append(made.number)
        return made

    def _remove(self, decision: dict[str, Any], step: float) -> None:
        moved = {int(old): new for old, new in (decision.get("columns") or {}).items()}
        gone = [c for c in decision.get("experts") or [] if 0 < c < len(self.columns)]
        details, merging = decision.get("details") or {}, decision["action"] == "merge"
        left = {moved.get(c, c): expert for c, expert in enumerate(self.columns) if c not in gone}
        numbers = [self.columns[c] for c in gone]
        for expert in numbers:
            self.experts[expert - 1].ended = ("merged" if merging else "evicted", step)
        heir = 0
        if merging:
            made = self._born(decision["skill"], step)
            left[details.get("into", max(left, default=0) + 1)] = heir = made.number
        if any(type(column) is not int or not 0 <= column <= MOST for column in left):
            raise ValueError("columns that no pool has")
        self.columns = [left.get(c, 0) for c in range(max(left, default=0) + 1)]
        heirs = details.get("heirs") or {}
        for skill, expert in self.serving.items():
            if expert in numbers:
                to = heirs.get(skill)
                self.serving[skill] = self.columns[to] if isinstance(to, int) and to < len(self.columns) else heir


def tell(found: Records) -> History:
    """Walk through metrics and decisions together: what precedes an arrival's first record had happened by then."""
    history, waiting, before, deciding = History(), list(found.decisions), 0.0, None
    for record in found.metrics:
        step = float(record["step"])
        if "novelty_threshold" in record:
            reached = _arrival(waiting, record.get("skill"))
            for decision in waiting[:reached]:
                history.apply(decision, step)
            deciding = waiting[reached - 1] if reached else None
            waiting, before = waiting[reached:], step
            history.starts.append((step, str(record.get("skill", ""))))
        history.moments.append(Moment(step, record, tuple(history.columns)))
        if isinstance(record.get("phase"), str) and deciding is not None:
            _grow(history, deciding, before, step, record["phase"])
            before = step
        history.last = max(history.last, step)
    for decision in waiting:
        history.apply(decision, number(decision.get("step")) or history.last)
    for name in _known_to_base(found):
        history.serving.setdefault(name, 0)
    return history


def _arrival(waiting: list[dict[str, Any]], skill: Any) -> int:
    """How many of the decisions that are left had been made when a skill's first record was written."""
    for count, decision in enumerate(waiting, 1):
        if decision["action"] not in NOT_ARRIVALS and decision["skill"] == skill:
            return count
    return 0


def _grow(history: History, decision: dict[str, Any], before: float, step: float, phase: str) -> None:
    column, refined = decision.get("expert"), (decision.get("outcome") or {}).get("refined") or {}
    if not isinstance(column, int) or not 0 < column < len(history.columns) or not history.columns[column]:
        return
    if decision["action"] != "create":
        phase = "undone" if refined.get("kept") is False else "refined"
    phases = history.experts[history.columns[column] - 1].phases
    if phases and (phases[-1].kind, phases[-1].skill, phases[-1].end) == (phase, decision["skill"], before):
        phases[-1].end = step
    else:
        phases.append(Phase(before, step, phase, decision["skill"]))


def _known_to_base(found: Records) -> list[str]:
    """Names of the base's own domain and of those that were only watched."""
    growth = found.options.get("growth")
    known = growth.get("base_skill") if isinstance(growth, dict) else None
    watched = found.options.get("domains")
    sources = [known, *(watched if isinstance(watched, list) else [])]
    return [source["name"] for source in sources if isinstance(source, dict) and isinstance(source.get("name"), str)]


@dataclass
class Matrix:
    """Losses: rows by skill learned, the base's first; columns by domain."""

    labels: list[str]
    rows: list[dict[str, float]]
    domains: list[str]


def matrix(found: Records) -> Matrix:
    """From the results if the run is finished, from the metrics otherwise; empty if there is neither."""
    skills, rows = [], []
    for record in found.metrics:
        row = losses(record)
        if row and not rows and "skill" not in record:
            rows.append(row)
        elif row and rows and record.get("after_skill"):
            skills.append(str(record.get("skill", "")))
            rows.append(row)
    final = found.results.get("matrix")
    if isinstance(final, list) and len(final) > len(rows) - 1 and all(isinstance(row, dict) for row in final):
        names = found.results.get("skills")
        rows = [{str(k): v for k, v in row.items() if number(v) is not None} for row in final]
        skills = [str(name) for name in names] if isinstance(names, list) else skills
    labels = ["base", *skills, *("?" for _ in range(len(rows) - 1 - len(skills)))][: len(rows)]
    if rows:
        for decision in found.decisions:  # a split skill's parts are not in the base's first record
            outcome = decision.get("outcome")
            value = number(outcome.get("loss_base")) if isinstance(outcome, dict) else None
            if value is not None:
                rows[0].setdefault(decision["skill"], value)
    domains = list(dict.fromkeys(name for row in rows for name in row))
    return Matrix(labels, rows, domains)
