"""Data-parallel training over several ranks: detect the launch, and run the collectives."""
