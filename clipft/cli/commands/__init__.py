"""One module per command; close siblings share one. Each calls one service and shows its result."""
