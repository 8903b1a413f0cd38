"""LoRA experts: factors, gathering the chosen ones, offloading to files, measuring which form is faster."""
