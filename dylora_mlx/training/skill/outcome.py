"""What came of a decision: losses, gain, cost and reward, added to its line of decisions.jsonl."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dylora_mlx.data.stream import Skill
from dylora_mlx.growth.decide import bandit_log
from dylora_mlx.growth.decide.bandit_log import Arm
from dylora_mlx.growth.decide.policy import Decision
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill.refine import RefinementVerdict


@dataclass(frozen=True)
class Outcome:
    """Of a skill that was learned, refined, or served as it was. Losses in nats a token, on validation text."""

    loss_base: float
    loss_before: float
    """As the pool was routed when the skill arrived."""
    loss: float
    steps: int
    """That were trained on the skill."""
    parameters: int
    """Of the new expert; 0 without one."""
    adapter_parameters: int
    """Of all experts."""
    worst_other_rise: float
    """The largest rise of another domain's loss."""
    refined: RefinementVerdict | None = None

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        if self.refined is None:
            del values["refined"]
        return values


def record_outcome(
    run: TrainingRun, skill: Skill, decision: Decision, refined: RefinementVerdict | None, before: float
) -> None:
    """Add the outcome to the decision's line. before: the skill's loss as the pool was routed when it arrived."""
    base, previous, now = run.state.matrix[0], run.state.matrix[-2], run.state.matrix[-1]
    parameters = 0
    if decision.creates:
        parameters = run.pool.expert_parameters(run.pool.records[decision.expert - 1].rank)
    rises = [loss - previous.get(name, loss) for name, loss in now.items() if name != skill.name]
    outcome = Outcome(
        loss_base=base[skill.name],
        loss_before=before,
        loss=now[skill.name],
        steps=run.state.skill_step,
        parameters=parameters,
        adapter_parameters=run.pool.num_parameters(),
        worst_other_rise=max(rises, default=0.0),
        refined=refined,
    )
    changes: dict[str, Any] = {"outcome": outcome.to_json()}
    if decision.bandit is not None:
        known = decision.bandit._replace(rewards=rewards(run, skill, decision, parameters))
        changes["bandit"] = bandit_log.to_json(known)
    run.log.update_last(changes)


def rewards(run: TrainingRun, skill: Skill, decision: Decision, parameters: int) -> dict[Arm, float]:
    """The reward of each arm that is known, nats a token.

    Of the arm that was taken, on validation text; of "create" after a trial; of "known" after a creation, which gains
    nothing over what existed; of none where the cooldown, a full pool or the budget overruled the choice.
    """
    if decision.novel and not decision.creates:
        return {}
    own = decision.expert if decision.creates else None
    expert_ids = [expert_id for expert_id in range(len(run.pool) + 1) if expert_id != own]
    best = min(run.evaluate_expert(skill.name, expert_id).loss for expert_id in expert_ids)
    gain, cost = best - run.state.matrix[-1][skill.name], run.config.growth.bandit.cost
    if decision.creates:
        return {"create": bandit_log.reward(gain, parameters, cost), "known": 0.0}
    found: dict[Arm, float] = {"known": bandit_log.reward(gain, 0, cost)}
    if decision.trial is not None:
        size = run.pool.expert_parameters(run.expert_rank(skill)[0])
        found["create"] = bandit_log.reward(decision.trial.gain, size, cost)
    return found
