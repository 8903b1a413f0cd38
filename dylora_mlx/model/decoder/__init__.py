"""The forward pass: attention, transformer blocks, and the loop over layers with experts."""
