"""What tests/stress/soak.py runs and what it makes of it."""
