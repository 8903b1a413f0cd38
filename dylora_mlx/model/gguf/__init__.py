"""Models in GGUF, the format of llama.cpp, LM Studio and Ollama, converted to Hugging Face folders."""
