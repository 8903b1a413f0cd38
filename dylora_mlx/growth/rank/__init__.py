"""How loss falls with LoRA rank, and the rank schedule that follows."""
