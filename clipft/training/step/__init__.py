"""One optimizer step: losses, gradient caching, sharding, out-of-memory recovery."""
