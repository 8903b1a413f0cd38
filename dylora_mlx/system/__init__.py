"""Operating-system services: BLAS, console, files, folder locks, random seeds, signals."""
