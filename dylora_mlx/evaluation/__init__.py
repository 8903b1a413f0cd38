"""Evaluation of a run: losses by domain, and code problems whose completions run in a sandbox."""
