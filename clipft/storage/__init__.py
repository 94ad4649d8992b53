"""Moves files between a local folder and S3 or the Hugging Face Hub."""
