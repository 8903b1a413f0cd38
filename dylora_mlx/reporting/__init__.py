"""A run's HTML report: one file, drawn from the run folder alone. It loads no model and needs no network."""
