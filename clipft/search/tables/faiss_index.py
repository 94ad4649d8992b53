"""An exact FAISS index of a table, and the keys of its rows beside it."""

from pathlib import Path

import numpy as np

from clipft.core.files import replacing
from clipft.search.tables.part_file import read_vectors


def write_faiss(folder: Path, dim: int, index_path: Path) -> None:
    """Write an ``IndexFlatIP`` of all vectors in the part files of a folder.

    Row n of the index is row n of the table, with the files in the order of their names, and row n
    of ``*.ids.parquet``. FAISS holds the index in memory, now and when it is opened: 4 bytes for
    each dimension of a vector.

    Raises:
        StorageError: The disk is full, or refuses to write.
    """
    import faiss
    from pyarrow import parquet

    index, writer = faiss.IndexFlatIP(dim), None
    with replacing(index_path.with_suffix(".ids.parquet")) as ids:
        for path in sorted(folder.glob("*.parquet")):
            index.add(np.ascontiguousarray(read_vectors(path)[1], np.float32))
            # Every file has these columns, whatever fields the pairs have
            names = parquet.read_table(path, columns=["key", "split", "caption"])
            names = names.replace_schema_metadata(None)
            writer = writer or parquet.ParquetWriter(ids, names.schema, compression="zstd")
            writer.write_table(names)
        if writer:
            writer.close()
    with replacing(index_path) as temporary:
        faiss.write_index(index, str(temporary))
