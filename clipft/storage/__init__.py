"""Moves files between S3 and a local folder."""
