"""Renders the HTML pages of a run, an inspection, an ablation or a search."""
