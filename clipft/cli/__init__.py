"""The face: one file per command. Reads settings, calls one service, shows its result."""
