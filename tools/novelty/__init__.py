"""Parts of tools/novelty_benchmark.py."""
