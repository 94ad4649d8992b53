"""``clipft soup``: the mean of several models' weights, and which of them to take."""
