"""Sends pairs through the two towers, and caches what frozen towers computed."""
