"""``clipft search`` and ``clipft embed``: embeddings, queried or written to files."""
