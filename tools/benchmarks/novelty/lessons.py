"""Train the bandit before it is judged, on the gain of a new expert at every arrival of development streams."""

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
    """Train the bandit on all arrivals that are files of one skill.

    For every arrival, an expert is trained for as many steps as in a run, so the rewards of both arms are known.

    Returns:
        The bandit, or None if the package's off-policy check does not trust it; and the reason of the check.
    """
    trials = []
    for number, stream in enumerate(streams):
        for arrival, context in player.contexts(number, stream):
            if arrival.kind == "mixed":
                continue
            means, _ = player.bank.means(arrival)
            novelty = measure_novelty(means, context.library, context.space, growth, context.seed)
            situation, evidence = lab.arrived(novelty, context.texts, context.trained_on, context.seed)
            bandit_context = policy.bandit_context(situation, evidence.existing())
            gain = evidence.reached(STEPS).gain
            rewards: dict[bandit_log.Arm, float] = {
                "create": bandit_log.reward(gain, lab.parameters(), growth.bandit.cost),
                "known": 0.0,
            }
            trials.append(
                bandit_log.BanditTrial(bandit_context, "create" if novelty.is_novel else "known", None, rewards)
            )
    options = growth.bandit
    verdict = bandit.check_off_policy(trials, needed=options.trials, tolerance=options.tolerance, seed=0)
    return (Bandit(trials) if verdict.trusted else None), verdict.reason
