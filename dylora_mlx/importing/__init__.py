"""Adapters and mixtures from elsewhere, taken into a run."""
