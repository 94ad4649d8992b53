"""Raw files -> shards -> batches. Knows nothing of the network or of a model's weights."""
