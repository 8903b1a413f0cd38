"""Pure conversions of experts and routers to the formats of mlx-lm, PEFT, X-LoRA and llama.cpp, without file access."""
