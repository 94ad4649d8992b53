"""Sends pairs through the two towers and keeps what frozen towers computed."""
