"""Reads WebDataset shards, with random access through an index or as a stream."""
