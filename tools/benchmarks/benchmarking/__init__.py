"""What tools/benchmarks/benchmark.py measures and how: workloads, contenders, matrix products, worker processes."""
