"""The settings model, where each value comes from, and the scenarios."""
