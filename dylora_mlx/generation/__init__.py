"""Text generation with a run: routed per token, or fused into the base for a whole prompt."""
