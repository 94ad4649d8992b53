"""Checks whether this machine is ready for a run, one check per question."""
