"""Decisions in words."""

from __future__ import annotations

from typing import Any

ACTIONS = {
    "create": "got an expert of its own, expert {expert}",
    "refine": "is known: expert {expert} went on training with it",
    "reuse": "is served by expert {expert} as it was",
    "skip": "is served by {server}",
    "merge": "were merged into expert {expert}",
    "evict": "was evicted",
    "import": "came from elsewhere as expert {expert}",
}


def sentence(found: dict[str, Any]) -> str:
    """What was done with a skill."""
    if found.get("kept") is False:
        return f"was to be {'merged' if found['action'] == 'merge' else 'evicted'}, which was undone"
    if found["action"] == "evict":
        heirs = found.get("details", {}).get("heirs", {})
        to = ", ".join(f"{skill} is served by {server(expert_id)}" for skill, expert_id in heirs.items())
        return f"was evicted{'; ' + to if to else ''}"
    return ACTIONS[found["action"]].format(expert=found["expert"], server=server(found["expert"]))


def server(expert_id: int) -> str:
    """What a column of the gates stands for."""
    return "the base itself" if expert_id == 0 else f"expert {expert_id}"
