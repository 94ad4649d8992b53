"""Batches + a trainable model -> a better model."""
