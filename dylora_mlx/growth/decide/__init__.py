"""From a measurement to a decision, and the log of decisions."""
