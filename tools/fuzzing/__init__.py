"""Readers of files, fed with damaged ones: targets, mutators, engines. tools/fuzz.py is the command."""
