"""What tools/soak.py runs and what it makes of it."""
