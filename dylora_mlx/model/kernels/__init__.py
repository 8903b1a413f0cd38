"""Low-level numerics: fast exponentials, rotary tables, chunked cross-entropy, quantised matmuls, CPU streams."""
