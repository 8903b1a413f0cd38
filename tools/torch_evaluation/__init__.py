"""Parts of tools/evaluate_cuda.py."""
