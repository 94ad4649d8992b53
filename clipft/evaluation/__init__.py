"""Embeddings -> figures. Takes arrays, knows no model and no file."""
