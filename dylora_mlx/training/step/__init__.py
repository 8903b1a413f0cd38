"""One optimisation step: losses, gradients, optimizers, evaluation."""
