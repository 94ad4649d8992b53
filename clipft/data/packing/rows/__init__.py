"""The rows of a table: delimited text, JSON or Parquet, each as a dictionary with its number."""
