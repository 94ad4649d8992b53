"""Turns arrays of vectors into figures with intervals; knows no model and no file."""
