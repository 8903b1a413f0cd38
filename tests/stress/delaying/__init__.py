"""A virtual network link with a delay, for tests/stress/parallel_delay.py."""
