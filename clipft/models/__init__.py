"""A base model + a scenario -> a trainable model. Knows nothing of files of pairs."""
