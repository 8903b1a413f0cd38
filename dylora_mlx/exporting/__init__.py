"""Export a run to PEFT, X-LoRA, PyTorch and full-model folders; model cards, hub upload, verification."""
