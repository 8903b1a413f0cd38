"""Export a run to PEFT, X-LoRA, PyTorch, llama.cpp and full-model folders; model cards, hub upload, verification."""
