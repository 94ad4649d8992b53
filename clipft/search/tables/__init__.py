"""``clipft embed``: the embeddings of a data set as Parquet files that other libraries open."""
