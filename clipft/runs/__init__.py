"""What a run leaves on disk: its folder, records, logs and checkpoints, and how they are read."""
