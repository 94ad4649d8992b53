"""Which folders an export may replace."""

import json

import pytest

from clipft.core.errors import UsageError
from clipft.export.target import MARK, check_target


@pytest.mark.parametrize("left", [None, {}, {"format": "transformers", "clipft": "0.1.0"}])
def test_a_new_an_empty_and_an_exported_folder_may_be_written(tmp_path, left):
    out = tmp_path / "out"
    if left is not None:
        out.mkdir()
        for name, value in {MARK: left, "model.safetensors": 1}.items() if left else ():
            (out / name).write_text(json.dumps(value))
    check_target(out)


@pytest.mark.parametrize(
    "left",
    [
        {"notes.txt": "mine"},
        {MARK: {"learning_rates": {"full": 1e-5}}, "model.safetensors": "a base model"},
        {MARK: "broken"},
    ],
)
def test_a_folder_of_the_user_is_refused(tmp_path, left):
    for name, content in left.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UsageError, match="is not empty"):
        check_target(tmp_path)
    assert all((tmp_path / name).exists() for name in left)
