"""The inputs, the child process and the evaluation of tests/stress/soak.py."""
