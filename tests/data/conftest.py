from pathlib import Path

import pytest

from tests.data.packing.pack_helpers import write_pair


@pytest.fixture
def raw(tmp_path) -> Path:
    """60 pairs in three folders."""
    for i in range(60):
        write_pair(tmp_path / "raw" / f"set{i % 3}" / f"p {i}.5.PNG", i, f"product number {i}")
    return tmp_path / "raw"
