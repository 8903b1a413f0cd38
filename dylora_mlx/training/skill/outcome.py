"""What came of a decision: losses, gain, cost and reward, added to its line in the ledger."""

from __future__ import annotations

from typing import Any

from dylora_mlx.data.stream import Skill
from dylora_mlx.growth.decide import bandit_log as trials
from dylora_mlx.training.run import Run


def settle(run: Run, skill: Skill, before: float) -> None:
    """Write the outcome. before: the skill's validation loss as the pool was routed when it arrived."""
    decision, after = run.state.decision, run.state.matrix[-1][skill.name]
    assert decision is not None
    created = decision["action"] == "create"
    parameters = run.pool.size(run.pool.records[decision["expert"] - 1].rank) if created else 0
    others = {name: loss - run.state.matrix[-2].get(name, loss) for name, loss in run.state.matrix[-1].items()}
    others.pop(skill.name)
    found: dict[str, Any] = {
        "loss_base": run.state.matrix[0][skill.name],
        "loss_before": before,
        "loss": after,
        "steps": run.state.skill_step,
        "parameters": parameters,
        "adapter_parameters": run.pool.parameters(),
        "worst_other": max(others.values(), default=0.0),
    }
    changes: dict[str, Any] = {"outcome": found | ({"refined": decision["refined"]} if "refined" in decision else {})}
    if decision["bandit"] is not None:
        changes["bandit"] = decision["bandit"] | {"rewards": rewards(run, skill, parameters)}
    run.ledger.settle(changes)


def rewards(run: Run, skill: Skill, parameters: int) -> dict[str, float]:
    """Reward of each arm that is known: of the one that was taken, on validation text; of "create" after a trial; of
    "known" after a creation, which gains nothing over what existed; of none if the choice was overruled."""
    decision = run.state.decision
    assert decision is not None
    if decision["novel"] and decision["action"] != "create":
        return {}  # cooldown, a full pool or the budget overruled what was chosen
    own = decision["expert"] if decision["action"] == "create" else None
    columns = [column for column in range(len(run.pool) + 1) if column != own]
    best = min(run.evaluate_alone(skill.name, column).loss for column in columns)
    gain, cost = best - run.state.matrix[-1][skill.name], run.config.growth.bandit.cost
    if decision["action"] == "create":
        return {"create": trials.reward(gain, parameters, cost), "known": 0.0}
    known = {"known": trials.reward(gain, 0, cost)}
    trial = decision["probe"].get("trial")
    if trial is None:
        return known
    size = run.pool.size(run.rank(skill)[0])
    return known | {"create": trials.reward(trial["gain"], size, cost)}
