"""Policies that turn a novelty measurement into a decision, and the decision log (decisions.jsonl)."""
