"""A training run from end to end: build, resume, loop over the skills, save checkpoints, forecast the cost."""
