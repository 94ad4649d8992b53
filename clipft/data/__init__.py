"""Turns raw files into shards and shards into batches."""
