"""Training: objective, compiled step, evaluation, metrics and checkpoints."""
