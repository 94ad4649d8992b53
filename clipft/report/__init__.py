"""Renders the HTML pages that a run, an inspection, an ablation or a search leaves."""
