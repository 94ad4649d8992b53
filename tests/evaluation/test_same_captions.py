import tarfile
from typing import Any, cast

from clipft.config.settings import Settings
from clipft.data.shards.folders import open_pairs
from clipft.evaluation.evaluator import EvaluationSet
from tests.conftest import add


def test_captions_that_clip_reads_alike_are_one_text(tmp_path):
    said = ["Café  chair", "caf&eacute; CHAIR", "Cafe\u0301 chair", "Cafe chair", "CAFÃ‰ chair"]
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for number, caption in enumerate(said):
            add(tar, f"{number}.jpg", bytes([number]))
            add(tar, f"{number}.txt", caption.encode())
    pairs = open_pairs(tmp_path)
    found = EvaluationSet.of(pairs, cast(Any, None), Settings()).identities.captions
    assert found.tolist() == [0, 0, 0, 1, 0]
