"""Checkpoints: atomic files on disk, the trainer state in them, and the feature cache."""
