import os
import pickle
import zipfile

import pytest
import torch

from clipft.errors import ModelError, StorageError
from clipft.training import checkpoint as module
from clipft.training.checkpoint import load_checkpoint, save_checkpoint

CONTENT = {
    "epoch": 1,
    "model_state_dict": {"w": torch.arange(4096.0)},
    "settings": {"lr": 1.0},
    "base_model": {"name": "x", "fingerprint": "y"},
}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "dual_lora_checkpoint.pt"
    save_checkpoint(path, CONTENT)
    return path


def test_round_trip_with_torch_alone(saved):
    content = torch.load(saved, weights_only=True)
    assert content["epoch"] == 1
    assert torch.equal(content["model_state_dict"]["w"], CONTENT["model_state_dict"]["w"])
    assert load_checkpoint(saved)["settings"] == {"lr": 1.0}
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def flip_a_bit(path):
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + len(data) // 4] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (flip_a_bit, "damaged"),
        (truncate, "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_text("{}"), "damaged"),
        (lambda path: path.unlink(), "no checkpoint"),
        (lambda path: torch.save({"epoch": 1}, path), "not a checkpoint of clipft"),
        (lambda path: torch.save({**CONTENT, "format_version": 99}, path), "newer clipft"),
    ],
)
def test_what_is_not_whole_is_refused(saved, harm, message):
    harm(saved)
    with pytest.raises(ModelError, match=message):
        load_checkpoint(saved)


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_code_in_a_checkpoint_is_not_run(saved, tmp_path):
    target = tmp_path / "executed"
    torch.save({**CONTENT, "format_version": 1, "bomb": Bomb(target)}, saved)
    with pytest.raises(ModelError, match="holds code"):
        load_checkpoint(saved)
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.exists()  # the bomb works


def test_a_failed_save_leaves_the_old_file_and_no_rest(saved, monkeypatch):
    before = saved.read_bytes()

    def full(*args):
        with open(args[1], "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.torch, "save", full)
    with pytest.raises(StorageError, match="No space left"):
        save_checkpoint(saved, CONTENT)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
