"""The model: a frozen base, LoRA experts on its projections, a router over its hidden states, and the loss head."""
