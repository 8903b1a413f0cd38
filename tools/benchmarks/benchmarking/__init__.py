"""Parts of tools/benchmarks/benchmark.py: workloads, contenders, matrix products, decoding, worker processes."""
