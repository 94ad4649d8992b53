"""Finds the fastest micro-batch that fits into memory, with training steps of several sizes."""
