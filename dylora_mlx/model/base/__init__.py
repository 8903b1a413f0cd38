"""The frozen base model: loading, model families, tokenizer, device memory limits."""
