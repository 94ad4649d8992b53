"""``clipft pack``: write WebDataset shards from files, tables or shards, split without leaks."""
