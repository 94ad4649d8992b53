"""Each example in the help of each command does what it says, in a folder as the help has it."""

import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipft.cli.app import COMMANDS, command_of, run
from clipft.data.demo.catalogue import render_pair
from tests.conftest import jpeg, write_shard

SLOW = ("clipft ablate", "clipft demo", "--processes", "find-batch-size", "--format onnx")
NEEDS_MORE = dict.fromkeys(
    ("--push", "hf://"), "the hub: tests/storage/test_hub.py has a server that stands in for it"
)
FAST = {
    "CLIPFT_MODEL": "tiny",
    "CLIPFT_MINI_TRAIN": "1",
    "CLIPFT_DEVICE": "cpu",
    "CLIPFT_PRECISION": "fp32",
    "CLIPFT_NUM_WORKERS": "0",
    "CLIPFT_RESAMPLES": "20",
    "CLIPFT_DATA_DIR": "catalogue",
    "CLIPFT_S3_RETRY_TIMEOUT": "2",
}


def examples() -> Iterator[str]:
    for command in map(command_of, COMMANDS):
        lines = [line.strip() for line in (command.__doc__ or "").splitlines()]
        found = [line for line in lines if shlex.split(line.replace("'", ""))[:1] == ["clipft"]]
        found += [line for line in lines if line.startswith("CLIPFT_")]
        assert found, f"{command.__name__} has no example"
        yield from found


def raw(folder: Path, numbers) -> None:
    folder.mkdir(parents=True)
    for number in numbers:
        pair = render_pair(7, number)
        (folder / f"{number}.jpg").write_bytes(jpeg(pair))
        (folder / f"{number}.txt").write_text(pair.caption)
        (folder / f"{number}.json").write_text(json.dumps(pair.metadata))


@pytest.fixture(scope="session")
def workspace(tmp_path_factory, catalogue, server, client) -> Path:
    """The folder that the examples speak of, with a bucket beside it. Copied for each."""
    home = tmp_path_factory.mktemp("examples")
    shutil.copytree(catalogue, home / "catalogue")
    write_shard(home / "general" / "val" / "0.tar", range(3000, 3030))
    write_shard(home / "old-shards" / "0.tar", range(60))
    raw(home / "photos", range(60))
    shutil.copy(home / "photos" / "1.jpg", home / "photo.jpg")
    rows = [f"photos/{n}.jpg,product {n},{n}" for n in range(60)]
    (home / "products.csv").write_text("\n".join(["image,caption,product_id", *rows]) + "\n")
    (home / "clipft.toml").write_text("lr = 1e-3\n")
    (home / "ablation.toml").write_text('[ablate]\nscenarios = ["dual_lora"]\nseeds = [1]\n')
    for bucket, prefix in (("bucket", "catalogue"), ("catalogue", "data")):
        client.create_bucket(Bucket=bucket)
        for shard in catalogue.rglob("*.tar"):
            key = f"{prefix}/{shard.relative_to(catalogue)}"
            client.put_object(Bucket=bucket, Key=key, Body=shard.read_bytes())
    for file in (home / "photos").iterdir():
        client.put_object(Bucket="bucket", Key=f"raw/{file.name}", Body=file.read_bytes())
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(home):
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "testtest"}
        for name, value in {**FAST, **keys, "CLIPFT_ENDPOINT_URL": server}.items():
            patch.setenv(name, value)
        patch.setenv("CLIPFT_CACHE", str(home / "cache"))
        bucket = ["--s3-bucket", "bucket", "--s3-prefix", "catalogue/train"]
        bucket += ["--s3-val-prefix", "catalogue/val", "--enable-s3-checkpoints"]
        assert run(["train", "--scenario", "dual_lora", *bucket]) == 0
        assert run(["export", "checkpoints/dual_lora", "my-clip"]) == 0
        for other in ("seed-1", "seed-2", "w10"):
            shutil.copytree("checkpoints", other)
    return home


def marked(example: str):
    slow = any(word in example for word in SLOW)
    return pytest.param(example, marks=pytest.mark.slow) if slow else example


@pytest.mark.parametrize("example", [marked(example) for example in examples()])
def test_the_example_runs(example, workspace, server, tmp_path, monkeypatch, capsys):
    for word, reason in NEEDS_MORE.items():
        if word in example:
            pytest.skip(f"needs {reason}")
    if example.startswith("clipft browse"):
        pytest.skip("runs until it is ended: tests/browse/test_command.py does that")
    if "tune" in example:
        pytest.skip("takes the whole of its budget: tests/e2e/test_tune.py has smaller ones")
    home = tmp_path / "home"
    shutil.copytree(workspace, home)
    monkeypatch.chdir(home)
    if " pack " in example:  # it makes what the other examples have
        shutil.rmtree(home / "catalogue")
    if " s3-" not in example and "s3://" not in example and "resume" in example:
        monkeypatch.setenv("CLIPFT_ENABLE_S3_CHECKPOINTS", "0")
    for name, value in {**FAST, "CLIPFT_ENDPOINT_URL": server}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CLIPFT_CACHE", str(home / "cache"))
    words = shlex.split(example.replace("http://localhost:9000", server))
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    target = Path(words.pop()) if words[-2] == ">" and words.pop(-2) else None
    assert words.pop(0) == "clipft"
    assert run(words) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    if "--json" in words:
        assert json.loads(said.out)
    if target:
        target.write_text(said.out)
        assert said.out
    made = [Path(word) for word in words[2:] if word.startswith("./") or word.endswith(".html")]
    assert all(path.exists() for path in made if "--dry-run" not in words), os.listdir(home)
