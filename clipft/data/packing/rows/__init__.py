"""The rows of a table: delimited text, JSON, Parquet or Arrow, as numbered dictionaries."""
