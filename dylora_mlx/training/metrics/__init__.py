"""Metric records, timers, FLOPs, Weights & Biases."""
