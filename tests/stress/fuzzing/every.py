"""Import every module of targets, which registers all targets."""

from __future__ import annotations

from fuzzing import of_adapters, of_checkpoints, of_config, of_data, of_growth, of_records

__all__ = ["of_adapters", "of_checkpoints", "of_config", "of_data", "of_growth", "of_records"]
