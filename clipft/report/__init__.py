"""Renders the HTML pages that a run, an inspection or an ablation leaves."""
