"""Loads a pretrained CLIP, makes it trainable under a scenario, and writes it back."""
