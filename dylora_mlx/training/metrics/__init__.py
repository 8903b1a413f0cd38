"""Metric records, timers, FLOP counts, Weights & Biases logging."""
