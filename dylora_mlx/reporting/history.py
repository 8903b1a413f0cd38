"""What happened to whom: experts by number in order of creation, whatever column they had at a time, and who serves what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dylora_mlx.growth.decide.decision_log import NON_ARRIVAL_ACTIONS
from dylora_mlx.reporting.records import RunRecords, finite_number, validation_losses

MAX_EXPERTS = 10_000
"""Columns of a pool at most: a record that says more is damaged, and drawn of nothing."""


@dataclass
class PhaseSpan:
    """Steps start to end that an expert spent in one phase: young, warming, mature, refined or undone."""

    start: float
    end: float
    kind: str
    skill: str


@dataclass
class ExpertHistory:
    """One expert's life. number: in order of creation, from 1; ended: how (merged, evicted) and at which step."""

    number: int
    name: str
    born: float
    phases: list[PhaseSpan] = field(default_factory=list)
    ended: tuple[str, float] | None = None
    imported: bool = False


@dataclass
class MetricPoint:
    """A metric record, and the numbers of the experts that its columns stand for."""

    step: float
    record: dict[str, Any]
    expert_ids: tuple[int, ...]


@dataclass
class History:
    """experts: by number, from 1; moments: metric records in order; starts: (step, skill) of every arrival;
    serving: the expert of each skill, 0 for the base; base: what the base itself knew, of which a domain is made."""

    experts: list[ExpertHistory] = field(default_factory=list)
    moments: list[MetricPoint] = field(default_factory=list)
    starts: list[tuple[float, str]] = field(default_factory=list)
    serving: dict[str, int] = field(default_factory=dict)
    expert_ids: list[int] = field(default_factory=lambda: [0])
    last: float = 0.0

    def label(self, expert: int) -> str:
        """An expert's number and name, as legends have it."""
        return f"{expert} {self.experts[expert - 1].name}" if 0 < expert <= len(self.experts) else "base"

    def apply(self, decision: dict[str, Any], step: float) -> None:
        """Change the pool as a decision did."""
        action, expert_id = decision["action"], decision.get("expert")
        if action in ("merge", "evict"):
            if decision.get("kept"):
                self._remove(decision, step)
            return
        if type(expert_id) is not int or not 0 <= expert_id <= MAX_EXPERTS:
            return
        while len(self.expert_ids) <= expert_id:
            self._born(decision["skill"], step).imported = action == "import"
        self.serving[decision["skill"]] = self.expert_ids[expert_id]

    def _born(self, name: str, step: float) -> ExpertHistory:
        made = ExpertHistory(len(self.experts) + 1, name, step)
        self.experts.append(made)
        self.expert_ids.append(made.number)
        return made

    def _remove(self, decision: dict[str, Any], step: float) -> None:
        moved = {int(old): new for old, new in (decision.get("expert_ids") or {}).items()}
        gone = [c for c in decision.get("experts") or [] if 0 < c < len(self.expert_ids)]
        details, merging = decision.get("details") or {}, decision["action"] == "merge"
        left = {moved.get(c, c): expert for c, expert in enumerate(self.expert_ids) if c not in gone}
        numbers = [self.expert_ids[c] for c in gone]
        for expert in numbers:
            self.experts[expert - 1].ended = ("merged" if merging else "evicted", step)
        heir = 0
        if merging:
            made = self._born(decision["skill"], step)
            left[details.get("into", max(left, default=0) + 1)] = heir = made.number
        if any(type(expert_id) is not int or not 0 <= expert_id <= MAX_EXPERTS for expert_id in left):
            raise ValueError("columns that no pool has")
        self.expert_ids = [left.get(c, 0) for c in range(max(left, default=0) + 1)]
        heirs = details.get("heirs") or {}
        for skill, expert in self.serving.items():
            if expert in numbers:
                to = heirs.get(skill)
                self.serving[skill] = self.expert_ids[to] if isinstance(to, int) and to < len(self.expert_ids) else heir


def build_history(found: RunRecords) -> History:
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
        history.moments.append(MetricPoint(step, record, tuple(history.expert_ids)))
        if isinstance(record.get("phase"), str) and deciding is not None:
            _grow(history, deciding, before, step, record["phase"])
            before = step
        history.last = max(history.last, step)
    for decision in waiting:
        history.apply(decision, finite_number(decision.get("step")) or history.last)
    for name in _known_to_base(found):
        history.serving.setdefault(name, 0)
    return history


def _arrival(waiting: list[dict[str, Any]], skill: Any) -> int:
    """How many of the decisions that are left had been made when a skill's first record was written."""
    for count, decision in enumerate(waiting, 1):
        if decision["action"] not in NON_ARRIVAL_ACTIONS and decision["skill"] == skill:
            return count
    return 0


def _grow(history: History, decision: dict[str, Any], before: float, step: float, phase: str) -> None:
    expert_id, refined = decision.get("expert"), (decision.get("outcome") or {}).get("refined") or {}
    if (
        not isinstance(expert_id, int)
        or not 0 < expert_id < len(history.expert_ids)
        or not history.expert_ids[expert_id]
    ):
        return
    if decision["action"] != "create":
        phase = "undone" if refined.get("kept") is False else "refined"
    phases = history.experts[history.expert_ids[expert_id] - 1].phases
    if phases and (phases[-1].kind, phases[-1].skill, phases[-1].end) == (phase, decision["skill"], before):
        phases[-1].end = step
    else:
        phases.append(PhaseSpan(before, step, phase, decision["skill"]))


def _known_to_base(found: RunRecords) -> list[str]:
    """Names of the base's own domain and of those that were only watched."""
    growth = found.options.get("growth")
    known = growth.get("base_skill") if isinstance(growth, dict) else None
    watched = found.options.get("domains")
    sources = [known, *(watched if isinstance(watched, list) else [])]
    return [source["name"] for source in sources if isinstance(source, dict) and isinstance(source.get("name"), str)]


@dataclass
class LossMatrix:
    """Losses: rows by skill learned, the base's first; columns by domain."""

    labels: list[str]
    rows: list[dict[str, float]]
    domains: list[str]


def loss_matrix(found: RunRecords) -> LossMatrix:
    """From the results if the run is finished, from the metrics otherwise; empty if there is neither."""
    skills, rows = [], []
    for record in found.metrics:
        row = validation_losses(record)
        if row and not rows and "skill" not in record:
            rows.append(row)
        elif row and rows and record.get("after_skill"):
            skills.append(str(record.get("skill", "")))
            rows.append(row)
    final = found.results.get("matrix")
    if isinstance(final, list) and len(final) > len(rows) - 1 and all(isinstance(row, dict) for row in final):
        names = found.results.get("skills")
        rows = [{str(k): v for k, v in row.items() if finite_number(v) is not None} for row in final]
        skills = [str(name) for name in names] if isinstance(names, list) else skills
    labels = ["base", *skills, *("?" for _ in range(len(rows) - 1 - len(skills)))][: len(rows)]
    if rows:
        for decision in found.decisions:  # a split skill's parts are not in the base's first record
            outcome = decision.get("outcome")
            value = finite_number(outcome.get("loss_base")) if isinstance(outcome, dict) else None
            if value is not None:
                rows[0].setdefault(decision["skill"], value)
    domains = list(dict.fromkeys(name for row in rows for name in row))
    return LossMatrix(labels, rows, domains)
