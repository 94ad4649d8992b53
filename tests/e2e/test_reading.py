"""Training on captions from a template, and on shards that are read in sequence."""

import json
from pathlib import Path

import pytest
import torch

from clipft.cli.app import run
from tests.conftest import add, jpeg, write_shard
from tests.e2e.test_train import assert_same_run, metrics, start, train, wait_for_step

STREAM = ("--stream", "--shuffle-buffer", "20", "--caption", "{color} {category} || {caption}")


@pytest.fixture(scope="module")
def streamed(catalogue, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("streamed")
    assert train(catalogue, out, *STREAM) == 0
    return out


@pytest.mark.slow
def test_a_stream_killed_and_resumed_with_other_workers_is_the_same_run(
    streamed, catalogue, tmp_path
):
    process = start(catalogue, tmp_path, *STREAM)
    wait_for_step(tmp_path, 5, process)
    process.kill()
    process.wait()
    more = ["--num-workers", "2"]
    assert run(["resume", str(tmp_path / "dual_lora_checkpoint.pt"), *more]) == 0
    assert_same_run(streamed, tmp_path)


@pytest.mark.slow
def test_a_stream_has_another_order_than_the_index(streamed, catalogue, tmp_path, capsys):
    indexed = tmp_path / "indexed"
    assert train(catalogue, indexed, "--caption", STREAM[-1]) == 0
    losses = [[m["loss"] for m in metrics(out / "dual_lora")[1:4]] for out in (streamed, indexed)]
    assert losses[0] != losses[1]
    capsys.readouterr()
    assert train(catalogue, indexed, *STREAM, "--resume-from-checkpoint") == 2
    assert "stream False -> True" in capsys.readouterr().err


def test_a_misspelt_field_is_found_before_anything_starts(catalogue, tmp_path, capsys):
    for more in ((), ("--stream",)):
        assert train(catalogue, tmp_path, "--caption", "{colour} {category}", *more) == 2
        printed = capsys.readouterr().err
        assert "no pair has a field 'colour'" in printed
        assert "did you mean color?" in printed
        assert not (tmp_path / "dual_lora_checkpoint.pt").exists()


def write(path: Path, numbers: range, caption: bytes | None) -> None:
    """Write a shard like those of the catalogue, with another caption or none."""
    import tarfile

    from clipft.data.demo.catalogue import render_pair

    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            pair = render_pair(7, number)
            add(tar, f"{number}.jpg", jpeg(pair))
            if caption is not None:
                add(tar, f"{number}.txt", caption + b" %d" % number)
            add(tar, f"{number}.json", json.dumps(pair.metadata).encode())


def test_pairs_with_metadata_alone_train_by_template_only(tmp_path, capsys):
    write(tmp_path / "train" / "0.tar", range(40), None)
    write(tmp_path / "val" / "0.tar", range(100, 120), None)
    assert train(tmp_path, tmp_path / "out") == 3
    printed = capsys.readouterr().err
    assert "40 of 40 pairs" in printed
    assert "the metadata has" in printed
    assert train(tmp_path, tmp_path / "out", "--caption", "{color} {category}") == 0


def test_long_captions_and_shared_pairs_are_reported_before_the_run(tmp_path, capsys):
    write(tmp_path / "train" / "0.tar", range(40), b"long " * 90)
    write(tmp_path / "val" / "0.tar", range(30, 50), b"long " * 90)
    assert train(tmp_path, tmp_path / "out", "--epochs", "1") == 0
    printed = capsys.readouterr().err
    # a digit is a token, so numbers of two digits make 94, of one 93
    assert "truncated 40 captions to the 77 tokens that the model takes: 18% of their" in printed
    assert "tokens are lost, and the longest has 94" in printed
    assert (
        "training also has the image of 10 and the caption of 20 of 20 validation pairs" in printed
    )


def test_a_clean_split_is_not_mentioned(tmp_path, capsys):
    write_shard(tmp_path / "train" / "0.tar", range(40))
    write_shard(tmp_path / "val" / "0.tar", range(100, 110))
    assert train(tmp_path, tmp_path / "out", "--epochs", "1") == 0
    assert "share" not in capsys.readouterr().err


def test_evaluation_uses_the_captions_of_the_run(streamed, catalogue, capsys):
    place = str(streamed / "dual_lora")
    figures = []
    for more in ((), ("--caption", "{caption}")):
        capsys.readouterr()
        assert run(["evaluate", place, "--data-dir", str(catalogue), "--json", *more]) == 0
        figures.append(json.loads(capsys.readouterr().out)["text_to_image"]["mrr"])
    best = torch.load(streamed / "dual_lora" / "best.pt", weights_only=True)["best"]
    assert figures[0] == pytest.approx(best["retrieval"]["text_to_image"]["mrr"], abs=1e-6)
    assert figures[0] != pytest.approx(figures[1], abs=1e-6)
