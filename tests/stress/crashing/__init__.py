"""Killing a run at chosen moments, and comparing what its resumption ends with."""
