"""``clipft browse``: a local page that searches with both models of a run, and judges them."""
