"""Draws the made-up furniture catalogue of the demo and the tests."""
