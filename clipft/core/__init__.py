"""Helpers that every layer may use: errors, safe file writing, memory, common types."""
