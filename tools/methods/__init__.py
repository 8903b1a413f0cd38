"""Ways to learn a stream of skills, for tools/compare_methods.py."""
