"""Computes figures with intervals from arrays of embeddings, without models or files."""
