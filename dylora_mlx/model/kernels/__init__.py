"""Numerics below the model: exponentials, rotary tables, the chunked loss head, quantized weights, CPU streams."""
