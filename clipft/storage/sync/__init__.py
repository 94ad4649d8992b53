"""``clipft sync``: copies a prefix of a bucket to a folder, or a folder to it."""
