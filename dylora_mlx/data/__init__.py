"""Sources to records, records to documents of tokens, documents to packed rows, rows to batches. NumPy only."""
