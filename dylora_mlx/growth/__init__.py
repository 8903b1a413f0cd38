"""Novelty, the decision, and the pool: the only place that adds or freezes an expert."""
