"""``clipft soup``: averages the weights of several models, and chooses which models to use."""
