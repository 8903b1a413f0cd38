"""Several processes of one run: how they were launched, and what they exchange."""
