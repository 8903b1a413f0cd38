"""Cost estimates of a run: FLOPs and bytes are counted, throughput is calibrated, and the result is compared with the run."""
