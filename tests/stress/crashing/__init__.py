"""The child process of tests/stress/crash_test.py, which kills itself at a chosen moment."""
