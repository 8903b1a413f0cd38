"""The frozen base: loading, model families, tokenizer, device limits."""
