"""Writes a fine-tuned model in the formats that other libraries open, with a model card."""
