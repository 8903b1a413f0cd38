"""Import adapters as experts of a run, and X-LoRA mixtures as runs."""
