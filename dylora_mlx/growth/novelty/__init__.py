"""Novelty detection: skill embeddings, similarity to the library, and splitting of mixed skills."""
