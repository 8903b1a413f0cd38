"""The router: its gate and the features that it reads."""
