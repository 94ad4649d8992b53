"""``clipft browse``: a local page to search with both models of a run, and to compare them."""
