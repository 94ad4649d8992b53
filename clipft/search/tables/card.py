"""The README.md of a folder of embeddings, which the Hugging Face Hub shows."""

from collections.abc import Mapping, Sequence
from typing import Any

_CARD = """---
tags:
- embeddings
- clip
configs:
{configs}
---

# Embeddings

{rows} of `{model}` ({scenario}), made with clipft {clipft}. Each `vector` has {dim} dimensions as
{dtype} and unit length, so that the dot product of two vectors is their cosine similarity.

```python
import polars
from datasets import load_dataset

rows = load_dataset("FOLDER_OR_REPOSITORY", "{table}")
rows = polars.read_parquet("{table}/*.parquet")
```

```sql
FROM '{table}/*.parquet' LIMIT 10  -- DuckDB
```
"""


def card(made_with: Mapping[str, Any], rows: Mapping[str, int], names: Sequence[str]) -> str:
    """Render the card. ``rows`` holds the number of rows by table, ``names`` the names of files."""
    splits = list(dict.fromkeys(name.partition("-")[0] for name in names))
    lines = []
    for table in rows:
        lines += [f"- config_name: {table}", "  data_files:"]
        for split in splits:
            # datasets calls rows without a split "train"
            shown = "train" if split == "data" and "train" not in splits else split
            lines += [f"  - split: {shown}", f"    path: {table}/{split}-*.parquet"]
    counts = " and ".join(f"{count:,} {table}" for table, count in rows.items())
    return _CARD.format(configs="\n".join(lines), rows=counts, table=next(iter(rows)), **made_with)
