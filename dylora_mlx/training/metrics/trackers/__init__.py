"""Log a run to experiment trackers: Weights & Biases, TensorBoard, Trackio, SwanLab, each through its own package."""
