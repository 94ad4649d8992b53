"""Finds the largest micro-batch that fits into memory, by training steps of several sizes."""
