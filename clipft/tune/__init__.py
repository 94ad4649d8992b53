"""Searches for the settings that suit a catalogue best, within a budget."""
