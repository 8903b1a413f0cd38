"""Checkpoints: files on disk, the state they hold, cached features."""
