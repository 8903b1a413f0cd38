"""How new a skill is: embeddings, similarity to the library, and whether it mixes several skills."""
