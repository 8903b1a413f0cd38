"""Describe decisions in words."""

from __future__ import annotations

from typing import Any

ACTIONS = {
    "create": "got an expert of its own, expert {expert}",
    "refine": "is known: expert {expert} went on training with it",
    "reuse": "is served by expert {expert} as it was",
    "skip": "is served by {server}",
    "wait": "waits",
    "merge": "were merged into expert {expert}",
    "evict": "was evicted",
    "restore": "was put back as expert {expert}",
    "import": "came from elsewhere as expert {expert}",
}
"""Predicate of each action; the skill's name is the subject."""


def sentence(decision: dict[str, Any]) -> str:
    """Return the predicate of a sentence about a decision's skill, for instance "was evicted".

    Raises KeyError for an unknown action or a missing field.
    """
    if decision.get("kept") is False and decision["action"] == "create":
        return f"was to get an expert of its own, which was undone: it is served by {server(decision['expert'])}"
    if decision.get("kept") is False:
        return f"was to be {'merged' if decision['action'] == 'merge' else 'evicted'}, which was undone"
    if decision["action"] == "evict":
        heirs = decision.get("details", {}).get("heirs", {})
        to = ", ".join(f"{skill} is served by {server(expert_id)}" for skill, expert_id in heirs.items())
        return f"was evicted{'; ' + to if to else ''}"
    return ACTIONS[decision["action"]].format(expert=decision["expert"], server=server(decision["expert"]))


def server(expert_id: int) -> str:
    """Return the name of a gate column in a sentence: the base or an expert."""
    return "the base itself" if expert_id == 0 else f"expert {expert_id}"
