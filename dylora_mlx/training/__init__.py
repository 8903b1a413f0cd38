"""Objective, compiled step, evaluation, metrics and checkpoints."""
