"""Finds checkpoints of open_clip and OpenAI, reads them without running code, and converts them."""
