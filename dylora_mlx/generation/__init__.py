"""Text from a run: routed token by token, or folded into the base for a whole prompt."""
