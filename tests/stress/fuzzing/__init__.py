"""Readers of files, fed with damaged ones: targets, mutators, engines. tests/stress/fuzz.py is the command."""
