"""Runs scenarios, settings and seeds as a grid of training runs and compares what they left."""
