"""``clipft pack``: raw files, tables or shards become shards with an honest split."""
