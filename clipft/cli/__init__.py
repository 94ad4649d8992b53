"""The terminal: the app, its options, its output and its progress displays."""
