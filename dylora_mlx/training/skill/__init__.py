"""Learning one skill: base pass, decision evidence, training, refinement, replay and the outcome."""
