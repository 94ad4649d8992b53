"""Runs clipft over files that others made to break decoders. They are brought by the caller."""
