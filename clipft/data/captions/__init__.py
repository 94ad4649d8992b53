"""Captions: where they come from, how they are composed, and their tokens."""
