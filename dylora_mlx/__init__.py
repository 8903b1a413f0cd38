"""DyLoRA-MoE on MLX: a frozen Gemma 3 base, a growing pool of LoRA experts, and a router that does not forget."""

from dylora_mlx import blas

__version__ = "0.1.0"

blas.preload()
