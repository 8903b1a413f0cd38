"""What the bandit learns before it is judged: on development streams, what an expert would have gained at every arrival."""

from __future__ import annotations

from collections.abc import Iterable

from dylora_mlx.config import GrowthConfig
from dylora_mlx.growth.decide import bandit, bandit_log, policy
from dylora_mlx.growth.decide.bandit import Bandit
from dylora_mlx.growth.novelty.measure import measure_novelty
from novelty.judging import Player
from novelty.probing import STEPS, Lab
from novelty.streams import Stream


def learn(player: Player, streams: Iterable[Stream], lab: Lab, growth: GrowthConfig) -> tuple[Bandit | None, str]:
    """The bandit after all files of one skill, None if the package's off-policy check does not trust it, and why.

    An expert is trained for every arrival as long as one in a run, so both arms' rewards are known.
    """
    found = []
    for number, stream in enumerate(streams):
        for arrival, context in player.contexts(number, stream):
            if arrival.kind == "mixed":
                continue
            means, _ = player.bank.means(arrival)
            seen = measure_novelty(means, context.library, context.space, growth, context.seed)
            situation, evidence = lab.arrived(seen, context.texts, context.taught, context.seed)
            known = policy.bandit_context(situation, evidence.existing())
            gain = evidence.reached(STEPS).gain
            rewards: dict[bandit_log.Arm, float] = {
                "create": bandit_log.reward(gain, lab.parameters(), growth.bandit.cost),
                "known": 0.0,
            }
            found.append(bandit_log.BanditTrial(known, "create" if seen.is_novel else "known", None, rewards))
    options = growth.bandit
    verdict = bandit.check_off_policy(found, needed=options.trials, tolerance=options.tolerance, seed=0)
    return (Bandit(found) if verdict.trusted else None), verdict.reason
