"""Loads pretrained CLIP models, adapts them to a scenario, and writes them for others."""
