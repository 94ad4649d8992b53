"""Reads WebDataset shards: through an index (any pair by number) or as a stream."""
