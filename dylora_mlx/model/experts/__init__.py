"""LoRA experts: factors, dense and gathered (sparse) mixtures, offloading to files, choosing the faster form."""
