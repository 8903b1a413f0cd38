"""One optimization step: losses, gradients, optimizers with their learning-rate schedule, and evaluation."""
