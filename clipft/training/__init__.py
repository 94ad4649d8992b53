"""A training run, from setup through the loop to its checkpoints."""
