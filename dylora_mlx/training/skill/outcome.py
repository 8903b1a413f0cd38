"""Record the outcome of a decision in its line of decisions.jsonl: losses, gain, cost and reward."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dylora_mlx.data.stream import Skill
from dylora_mlx.growth.decide import bandit_log
from dylora_mlx.growth.decide.bandit_log import Arm
from dylora_mlx.growth.decide.policy import Decision
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill import probe
from dylora_mlx.training.skill.create import CreationVerdict
from dylora_mlx.training.skill.refine import RefinementVerdict


@dataclass(frozen=True)
class Outcome:
    """Outcome for a skill that was learned, refined, or served without training. Losses are in nats a token, on
    validation text."""

    loss_base: float
    """Loss of the base."""
    loss_before: float
    """Loss under the pool's routing when the skill arrived."""
    loss: float
    """Loss afterwards."""
    steps: int
    """Steps trained on the skill."""
    parameters: int
    """Parameters of the new expert, or 0 if none was created."""
    adapter_parameters: int
    """Parameters of all experts."""
    worst_other_rise: float
    """The largest rise of another domain's loss, of those whose loss just before the skill is known."""
    refined: RefinementVerdict | None = None
    """Verdict on the refinement, if there was one."""
    created: CreationVerdict | None = None
    """Verdict on the new expert, if one was trained."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dict for decisions.jsonl, without verdicts that were not made."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def record_outcome(
    run: TrainingRun,
    skill: Skill,
    decision: Decision,
    verdict: CreationVerdict | RefinementVerdict | None,
    expert_id: int,
    arrival_loss: float,
) -> None:
    """Add the outcome to the decision's line.

    Args:
        run: the run.
        skill: the skill that was finished.
        decision: the decision on it.
        verdict: verdict on what was trained for it.
        expert_id: the expert that serves it now. Another than the decision's if a new expert was undone.
        arrival_loss: the skill's loss under the pool's routing when it arrived.
    """
    undone = isinstance(verdict, CreationVerdict) and not verdict.kept
    base_losses, now = run.state.matrix[0], run.state.matrix[-1]
    parameters = 0
    if decision.creates and not undone:
        parameters = run.pool.expert_parameters(run.pool.records[decision.expert - 1].rank)
    outcome = Outcome(
        loss_base=base_losses[skill.name],
        loss_before=arrival_loss,
        loss=now[skill.name],
        steps=run.state.skill_step,
        parameters=parameters,
        adapter_parameters=run.pool.num_parameters(),
        worst_other_rise=max(_other_rises(run, skill, verdict).values(), default=0.0),
        refined=verdict if isinstance(verdict, RefinementVerdict) else None,
        created=verdict if isinstance(verdict, CreationVerdict) else None,
    )
    changes: dict[str, Any] = {"outcome": outcome.to_json()}
    if undone:
        changes |= {"kept": False, "expert": expert_id}
    if decision.bandit is not None:
        bandit_trial = decision.bandit._replace(rewards=rewards(run, skill, decision, parameters, undone))
        changes["bandit"] = bandit_log.to_json(bandit_trial)
    run.log.update_last(changes)


def _other_rises(
    run: TrainingRun, skill: Skill, verdict: CreationVerdict | RefinementVerdict | None
) -> dict[str, float]:
    """Return the rise of the other domains' losses by this skill. A loss that is older than the skill before does not count:
    it would blame this skill for what all since then have done."""
    before, now = run.state.matrix[-2:]
    rises = {name: loss - before[name] for name, loss in now.items() if name in before}
    if verdict is not None and verdict.kept:
        # Measured just without and with this training, also where the skill before left a domain out.
        worst = {} if verdict.worst_domain is None else {verdict.worst_domain: verdict.worst_rise}
        rises |= {**verdict.risen, **worst}
    return {name: rise for name, rise in rises.items() if name != skill.name}


def rewards(
    run: TrainingRun, skill: Skill, decision: Decision, parameters: int, undone: bool = False
) -> dict[Arm, float]:
    """Return the known rewards by arm, in nats a token.

    - After a creation: "create" by its validation loss, and 0 for "known", which gains nothing over what existed. An
      expert that was undone gained nothing and cost nothing.
    - For a known skill: "known" by its validation loss, and "create" by the trial expert's gain, if there was one.
    - None, if the cooldown, a full pool or the budget overruled the choice.
    """
    if decision.novel and not decision.creates:
        return {}
    if undone:
        return {"create": 0.0, "known": 0.0}
    new_expert = decision.expert if decision.creates else None
    existing = probe.probed_experts(run, decision.similarities)
    expert_ids = [expert_id for expert_id in existing if expert_id != new_expert]
    best = min(run.evaluate_expert(skill.name, expert_id).loss for expert_id in expert_ids)
    gain, cost = best - run.state.matrix[-1][skill.name], run.config.growth.bandit.cost
    if decision.creates:
        return {"create": bandit_log.reward(gain, parameters, cost), "known": 0.0}
    arm_rewards: dict[Arm, float] = {"known": bandit_log.reward(gain, 0, cost)}
    if decision.trial is not None:
        size = run.pool.expert_parameters(run.expert_rank(skill)[0])
        arm_rewards["create"] = bandit_log.reward(decision.trial.gain, size, cost)
    return arm_rewards
