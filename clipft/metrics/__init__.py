"""Turns arrays of embeddings into figures with intervals. Knows no model and reads no file."""
