"""Data pipeline: read sources, tokenize records into documents, pack documents into rows, batch the rows. No MLX."""
