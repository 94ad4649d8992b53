"""Trains a grid of scenarios, settings and seeds, and compares the runs."""
