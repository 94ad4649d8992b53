"""The regions of a page, as a screen reader lists them."""

import re


def regions(page: str) -> list[str]:
    """Return the names of its tables and sections, which must all differ."""
    tables = re.findall(r'role="region" aria-label="([^"]*)"', page)
    return tables + re.findall(r'<h2 id="[^"]*-title">([^<]*)</h2>', page)
