"""Rebuild a run's history from its records: the experts' lives, which skill each serves, and the loss matrix.

An expert's number is its order of creation. Merging and evicting change gate columns (expert_id), but no numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dylora_mlx.growth.decide.decision_log import NON_ARRIVAL_ACTIONS
from dylora_mlx.reporting.records import RunRecords, finite_number, validation_losses

MAX_EXPERTS = 10_000
"""Largest accepted gate column. A record with a larger one is damaged and is not drawn."""


@dataclass
class PhaseSpan:
    """A span of steps that an expert spent in one phase."""

    start: float
    end: float
    kind: str
    """dense, annealing, mature, refined, or undone for a refinement that was rolled back."""
    skill: str
    """The skill that it trained on."""


@dataclass
class ExpertHistory:
    """One expert's life."""

    number: int
    """Its order of creation, from 1."""
    name: str
    """The skill that it was created for."""
    born: float
    """Step of its creation."""
    phases: list[PhaseSpan] = field(default_factory=list)
    """Its training phases in order."""
    ended: tuple[str, float] | None = None
    """How it ended ("merged" or "evicted") and at which step; None while it is in the pool."""
    imported: bool = False
    """Whether it was imported."""


@dataclass
class MetricPoint:
    """One metric record."""

    step: float
    record: dict[str, Any]
    expert_ids: tuple[int, ...]
    """Expert number of each gate column at that time; 0 is the base."""


@dataclass
class History:
    """A run's history. While it is built, `apply` replays the decisions on it."""

    experts: list[ExpertHistory] = field(default_factory=list)
    """All experts that ever were in the pool; number n is at index n - 1."""
    moments: list[MetricPoint] = field(default_factory=list)
    """Metric records in order."""
    starts: list[tuple[float, str]] = field(default_factory=list)
    """(step, skill) of every arrival."""
    serving: dict[str, int] = field(default_factory=dict)
    """Number of the expert that serves each skill; 0 for the base."""
    expert_ids: list[int] = field(default_factory=lambda: [0])
    """Expert number of each gate column now; 0 is the base."""
    last: float = 0.0
    """Step of the last metric record."""

    def label(self, expert: int) -> str:
        """Return an expert's number and name for legends, or "base"."""
        return f"{expert} {self.experts[expert - 1].name}" if 0 < expert <= len(self.experts) else "base"

    def apply(self, decision: dict[str, Any], step: float) -> None:
        """Replay a decision: create, merge, evict or restore experts, and assign its skill to an expert."""
        action, expert_id = decision["action"], decision.get("expert")
        if action in ("merge", "evict"):
            if decision.get("kept"):
                self._remove(decision, step)
            return
        if type(expert_id) is not int or not 0 <= expert_id <= MAX_EXPERTS:
            return
        while len(self.expert_ids) <= expert_id:
            self._create_expert(decision["skill"], step).imported = action == "import"
        served = (decision.get("details") or {}).get("skills") or [] if action == "restore" else [decision["skill"]]
        self.serving |= dict.fromkeys(map(str, served), self.expert_ids[expert_id])

    def _create_expert(self, name: str, step: float) -> ExpertHistory:
        expert = ExpertHistory(len(self.experts) + 1, name, step)
        self.experts.append(expert)
        self.expert_ids.append(expert.number)
        return expert

    def _remove(self, decision: dict[str, Any], step: float) -> None:
        new_ids = {int(old): new for old, new in (decision.get("expert_ids") or {}).items()}
        removed_ids = [c for c in decision.get("experts") or [] if 0 < c < len(self.expert_ids)]
        details, merging = decision.get("details") or {}, decision["action"] == "merge"
        remaining = {new_ids.get(c, c): expert for c, expert in enumerate(self.expert_ids) if c not in removed_ids}
        removed_experts = [self.expert_ids[c] for c in removed_ids]
        for expert in removed_experts:
            self.experts[expert - 1].ended = ("merged" if merging else "evicted", step)
        heir = 0
        if merging:
            merged = self._create_expert(decision["skill"], step)
            remaining[details.get("into", max(remaining, default=0) + 1)] = heir = merged.number
        if any(type(expert_id) is not int or not 0 <= expert_id <= MAX_EXPERTS for expert_id in remaining):
            raise ValueError("columns that no pool has")
        self.expert_ids = [remaining.get(c, 0) for c in range(max(remaining, default=0) + 1)]
        heirs = details.get("heirs") or {}
        for skill, expert in self.serving.items():
            if expert in removed_experts:
                heir_id = heirs.get(skill)
                self.serving[skill] = (
                    self.expert_ids[heir_id] if isinstance(heir_id, int) and heir_id < len(self.expert_ids) else heir
                )


def build_history(records: RunRecords) -> History:
    """Rebuild the history from metrics and decisions.

    Metrics are read in order. All decisions up to a skill's own are applied at its first metric record, because they
    were made before it was written.
    """
    history, pending, previous_step, current_decision = History(), list(records.decisions), 0.0, None
    expert_ids = (0,)  # shared by the moments between two changes: with many experts it is long
    for record in records.metrics:
        step = float(record["step"])
        if "novelty_threshold" in record:
            num_applied = _decisions_until_arrival(pending, record.get("skill"))
            for decision in pending[:num_applied]:
                history.apply(decision, step)
            current_decision = pending[num_applied - 1] if num_applied else None
            pending, previous_step = pending[num_applied:], step
            history.starts.append((step, str(record.get("skill", ""))))
        if len(expert_ids) != len(history.expert_ids) or "novelty_threshold" in record:
            expert_ids = tuple(history.expert_ids)
        history.moments.append(MetricPoint(step, record, expert_ids))
        if isinstance(record.get("phase"), str) and current_decision is not None:
            _extend_phase(history, current_decision, previous_step, step, record["phase"])
            previous_step = step
        history.last = max(history.last, step)
    for decision in pending:
        history.apply(decision, finite_number(decision.get("step")) or history.last)
    for name in _known_to_base(records):
        history.serving.setdefault(name, 0)
    return history


def _decisions_until_arrival(pending: list[dict[str, Any]], skill: Any) -> int:
    """Count the pending decisions that were made before a skill's first metric record was written."""
    for count, decision in enumerate(pending, 1):
        if decision["action"] not in NON_ARRIVAL_ACTIONS and decision["skill"] == skill:
            return count
    return 0


def _extend_phase(history: History, decision: dict[str, Any], start: float, end: float, phase: str) -> None:
    """Add steps start to end to the current phase of the decision's expert, or begin a new phase."""
    expert_id, refined = decision.get("expert"), (decision.get("outcome") or {}).get("refined") or {}
    if (
        not isinstance(expert_id, int)
        or not 0 < expert_id < len(history.expert_ids)
        or not history.expert_ids[expert_id]
    ):
        return
    if decision["action"] == "create" and decision.get("kept") is False:
        return  # the expert is gone, and the decision names the one that serves the skill
    if decision["action"] != "create":
        phase = "undone" if refined.get("kept") is False else "refined"
    phases = history.experts[history.expert_ids[expert_id] - 1].phases
    if phases and (phases[-1].kind, phases[-1].skill, phases[-1].end) == (phase, decision["skill"], start):
        phases[-1].end = end
    else:
        phases.append(PhaseSpan(start, end, phase, decision["skill"]))


def _known_to_base(records: RunRecords) -> list[str]:
    """Return the names of the domains that the base serves: its base skill, and the domains that are only evaluated."""
    growth = records.options.get("growth")
    base_skill = growth.get("base_skill") if isinstance(growth, dict) else None
    watched = records.options.get("domains")
    sources = [base_skill, *(watched if isinstance(watched, list) else [])]
    return [source["name"] for source in sources if isinstance(source, dict) and isinstance(source.get("name"), str)]


@dataclass
class LossMatrix:
    """Validation losses after each learned skill."""

    labels: list[str]
    """Name of each row: "base", then the skills in the order of learning."""
    rows: list[dict[str, float]]
    """Losses by domain, in nats per token."""
    domains: list[str]
    """All domains, which are the columns."""


def loss_matrix(records: RunRecords) -> LossMatrix:
    """Build the loss matrix from results.json if it is complete, else from the metrics. Empty if neither has losses."""
    skills, rows = [], []
    for record in records.metrics:
        row = validation_losses(record)
        if row and not rows and "skill" not in record:
            rows.append(row)
        elif row and rows and record.get("after_skill"):
            skills.append(str(record.get("skill", "")))
            rows.append(row)
    final = records.results.get("matrix")
    if isinstance(final, list) and len(final) > len(rows) - 1 and all(isinstance(row, dict) for row in final):
        names = records.results.get("skills")
        rows = [{str(k): v for k, v in row.items() if finite_number(v) is not None} for row in final]
        skills = [str(name) for name in names] if isinstance(names, list) else skills
    labels = ["base", *skills, *("?" for _ in range(len(rows) - 1 - len(skills)))][: len(rows)]
    if rows:
        # Parts of a split skill are unknown when the base is evaluated first, and a skill that arrives may not be among those
        # that were evaluated after the one before: these losses are in the decision log.
        for decision in records.decisions:
            skill, outcome = decision["skill"], decision.get("outcome")
            for kind, row in (("loss_base", 0), ("loss_before", labels.index(skill) - 1 if skill in labels else -1)):
                value = finite_number(outcome.get(kind)) if isinstance(outcome, dict) else None
                if value is not None and row >= 0:
                    rows[row].setdefault(skill, value)
    domains = list(dict.fromkeys(name for row in rows for name in row))
    return LossMatrix(labels, rows, domains)
