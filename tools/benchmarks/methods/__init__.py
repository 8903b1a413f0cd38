"""Ways to learn a stream of skills, for tools/benchmarks/compare_methods.py."""
