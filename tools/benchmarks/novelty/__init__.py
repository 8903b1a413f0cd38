"""Parts of tools/benchmarks/novelty_benchmark.py."""
