"""What the package asks of the operating system: BLAS, console, files, locks, signals."""
