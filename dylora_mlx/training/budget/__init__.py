"""Limits on adapter parameters and memory: merge, evict and archive experts, and offload frozen ones to files."""
