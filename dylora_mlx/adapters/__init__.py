"""Pure conversions of experts and routers to the formats of mlx-lm, PEFT and X-LoRA, without file access."""
