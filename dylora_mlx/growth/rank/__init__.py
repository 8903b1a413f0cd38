"""Power law of the loss over the LoRA rank, and the rank schedule derived from it."""
