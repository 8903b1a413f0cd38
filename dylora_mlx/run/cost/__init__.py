"""What a run costs: counted, timed by a short calibration, and compared with what it took."""
