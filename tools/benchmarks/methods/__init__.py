"""Continual-learning methods for tools/benchmarks/compare_methods.py, and gates for compare_gates.py."""
