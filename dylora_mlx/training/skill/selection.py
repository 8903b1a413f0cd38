"""Which domains are evaluated after a skill: all of them while that is affordable, else a selection.

With a thousand skills, evaluating everything ever learned after every skill takes far longer than learning it. A skill can
harm those that resemble it, so these are always evaluated, as are the skill itself and all text outside the stream. Of the
other skills a random sample is drawn, anew for every skill, from which the forgetting of all can be estimated
(reporting/continual.py). What is not evaluated keeps its last value. The end of a run evaluates everything.
"""

from __future__ import annotations

from typing import NamedTuple

from dylora_mlx.data.stream import Skill
from dylora_mlx.growth.decide.policy import Decision
from dylora_mlx.system.seeds import SeedStream, generator
from dylora_mlx.training.run import TrainingRun

SIMILAR_SHARE = 0.5
"""Share of the tokens left for earlier skills that goes to the most similar ones; the sample has the rest."""


class Selection(NamedTuple):
    """The domains that are evaluated after a skill."""

    certain: list[str]
    """The skill, all domains outside the stream, skills of an expert that is refined, and the most similar earlier skills."""
    sample: list[str]
    """A simple random sample of the other learned skills, without replacement."""

    @property
    def names(self) -> set[str]:
        """All domains that are evaluated."""
        return {*self.certain, *self.sample}


def select_domains(run: TrainingRun, skill: Skill, decision: Decision) -> Selection | None:
    """Return the domains to evaluate after a skill; None for all, which fit `eval.total_tokens`.

    The selection depends on the run's state and seed alone, so a resumed run makes the same one.
    """
    budget, sizes = run.config.eval.total_tokens, {name: domain.positions for name, domain in run.domains.items()}
    if budget is None or sum(sizes.values()) <= budget:
        return None
    stream = {each.name for each in run.skills}
    earlier = [each.name for each in run.skills[: run.state.skill_index]]
    refined = decision.expert if decision.action == "refine" else None  # what is only served changes nothing
    served = {name for name, expert_id in run.library.experts_of.items() if expert_id == refined}
    certain = [n for n in run.domains if n == skill.name or n not in stream or (n in served and n in earlier)]
    ranked = sorted(set(earlier).difference(certain), key=lambda name: (-decision.similarities.get(name, -1.0), name))
    left = budget - sum(sizes[name] for name in certain)
    similar, spent = 0, 0
    while similar < len(ranked) and (not similar or spent + sizes[ranked[similar]] <= SIMILAR_SHARE * left):
        spent += sizes[ranked[similar]]
        similar += 1
    others = sorted(ranked[similar:])
    # The size of the sample must not depend on what is drawn: mean sizes, not those of the drawn domains.
    mean = sum(sizes[name] for name in others) / max(1, len(others))
    count = min(len(others), max(2, int((left - spent) / max(1.0, mean))))
    drawn = generator(run.config.seed, SeedStream.SELECTION, run.state.skill_index).permutation(len(others))[:count]
    return Selection([*certain, *ranked[:similar]], sorted(others[number] for number in drawn))
