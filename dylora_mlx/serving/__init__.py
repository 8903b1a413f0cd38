"""A run behind OpenAI's HTTP API, on the engine of mlx_lm.server: rows of one batch are routed, or have one expert each."""
