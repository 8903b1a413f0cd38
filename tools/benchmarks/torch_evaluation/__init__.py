"""Parts of tools/benchmarks/evaluate_cuda.py."""
