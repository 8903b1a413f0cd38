"""The forward pass: attention, blocks, and the loop over layers with experts."""
