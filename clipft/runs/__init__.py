"""Reads and writes the files of a run: its folder, records, logs and checkpoints."""
