"""A run's report: one HTML file, drawn from what the run folder holds. No model is loaded, nothing is fetched."""
