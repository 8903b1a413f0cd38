"""The frozen base, the experts on its projections, the router over its states, and the loss head."""
