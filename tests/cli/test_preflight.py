"""What can be refused without torch is refused before it is imported, in every command."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clipft.config.settings import Settings
from clipft.core.errors import DataError, ModelError, StorageError, UsageError
from clipft.models.adapters import without_bitsandbytes
from clipft.runs.checkpoint import save_checkpoint
from clipft.runs.folder import run_lock
from tests.cli.forks import in_forks
from tests.conftest import write_shard
from tests.tiny_run import TINY

SLOW = ("torch", "transformers", "torchvision", "sklearn", "scipy", "peft", "wandb", "boto3")
"""Libraries whose import takes longer than a refusal may take."""

MISSING, FOREIGN, NEWER = "no checkpoint", "is not a checkpoint of clipft", "written by a newer"

REFUSED = {
    # paths of data
    "train --data-dir nope --model tiny": (DataError, "no folder nope/train"),
    "train --data-dir {files} --model tiny": (DataError, "no folder {files}/train"),
    "train --data-dir nope --plan --model tiny": (DataError, "no folder nope/train"),
    "train --data-dir nope --processes 2 --model tiny": (DataError, "no folder nope/train"),
    "train --data-dir {broken} --model tiny": (DataError, "is not a complete tar"),
    "ablate --data-dir nope --model tiny --output-dir {new}": (DataError, "no folder nope/train"),
    "evaluate {run} --data-dir nope": (DataError, "no folder nope/val"),
    "evaluate {run} --data-dir {data} --keep nope": (DataError, "no folder nope/val"),
    "zero-shot --model tiny --data-dir nope": (DataError, "no folder nope/val"),
    "search tiny nope lamp": (DataError, "no folder nope"),
    "embed tiny nope out": (DataError, "no folder nope"),
    "search tiny {data} --image nope.jpg": (DataError, "cannot read nope.jpg"),
    "find-batch-size --model tiny --data-dir nope": (DataError, "no folder nope/train"),
    "inspect nope --model tiny": (DataError, "no folder nope"),
    "inspect {data} --against nope --model tiny": (DataError, "no folder nope"),
    "pack nope {new}": (DataError, "nope does not exist"),
    # models
    "train --data-dir {data} --model ./nope": (ModelError, "no model in ./nope"),
    "train --data-dir {data} --model {bert}": (ModelError, "is a bert model, not CLIP"),
    "train --data-dir {data} --model {pointer}": (ModelError, "is a pointer of Git LFS"),
    "train --data-dir {data} --model no-such/model": (ModelError, "cannot get model no-such/mod"),
    "ablate --data-dir {data} --model ./nope --output-dir {new}": (ModelError, "no model in ./no"),
    "find-batch-size --model ./nope": (ModelError, "no model in ./nope"),
    "inspect {data} --model ./nope": (ModelError, "no model in ./nope"),
    "zero-shot --data-dir {data} --model ./nope": (ModelError, "no model in ./nope"),
    "zero-shot nope --data-dir {data}": (ModelError, "cannot get model nope"),
    "search nope {data} lamp": (ModelError, "cannot get model nope"),
    "export nope {new}": (ModelError, "cannot get model nope"),
    "demo --model ./nope --output-dir {new}": (ModelError, "no model in ./nope"),
    # checkpoints and runs
    "evaluate nope --data-dir {data}": (ModelError, MISSING),
    "evaluate --output-dir nope --data-dir {data}": (ModelError, MISSING),
    "evaluate {files}/some.txt --data-dir {data}": (ModelError, "is damaged"),
    "evaluate {foreign} --data-dir {data}": (ModelError, FOREIGN),
    "evaluate {newer} --data-dir {data}": (ModelError, NEWER),
    "evaluate {orphan} --data-dir {data}": (ModelError, "no model in ./gone"),
    "zero-shot {foreign} --data-dir {data}": (ModelError, FOREIGN),
    "search {foreign} {data} lamp": (ModelError, FOREIGN),
    "search ./nope {data} lamp": (ModelError, MISSING),
    "embed ./nope {data} out": (ModelError, MISSING),
    "export {foreign} {new}": (ModelError, FOREIGN),
    "export ./nope {new}": (ModelError, MISSING),
    "export {orphan} {new}": (ModelError, "no model in ./gone"),
    "resume --output-dir nope": (ModelError, "no *_checkpoint.pt in nope"),
    "resume {foreign}": (ModelError, FOREIGN),
    "resume {weights}": (ModelError, "holds weights but no run to resume"),
    "train --data-dir {data} --model tiny --output-dir {changed} --lr 1 --resume-from-checkpoint": (
        UsageError,
        "cannot change on resume: lr",
    ),
    "report nope": (UsageError, "no run in nope"),
    "report {files}": (UsageError, "no run in {files}"),
    # folders that are taken
    "train --data-dir {data} --model tiny --output-dir {taken}": (UsageError, "in progress in"),
    "export tiny {files}": (UsageError, "and is not an earlier export"),
    "pack {data} {files}": (UsageError, "holds no earlier pack"),
    "search tiny {data} lamp --html {files}": (UsageError, "is a folder"),
    "zero-shot --model tiny --data-dir {data} --save-classifier {files}": (
        StorageError,
        "it is a folder",
    ),
    # names and options
    "train --data-dir {data} --model tiny --caption {{nmae}}": (UsageError, "no pair has a field"),
    "train --data-dir {data} --model tiny --group-field nope": (UsageError, "no pair has a field"),
    "train --scenario dual_lara": (UsageError, "did you mean dual_lora?"),
    "train --data-dir {data} --model tiny --enable-s3-checkpoints": (UsageError, "needs a bucket"),
    "train --nope": (UsageError, "no such option: --nope"),
    "train --config nope.toml": (UsageError, "nope.toml"),
    "evaluate {run} --data-dir {data} --label-field nope": (UsageError, "no pair has a field"),
    "evaluate {run} --data-dir {data} --interpolate 2": (UsageError, "--interpolate 2"),
    "evaluate {run} --data-dir {data} --save-interpolated 2 x.pt": (UsageError, "not between 0"),
    "zero-shot --model tiny --data-dir {data} --templates nope": (UsageError, "--templates nope"),
    "zero-shot --model tiny --data-dir {data} --labels nope": (UsageError, "--labels nope"),
    "search tiny {data} lamp --caption {{nmae}}": (UsageError, "no pair has a field"),
    "export tiny {new} --format peft": (UsageError, "zero_shot trains no adapter"),
    "ablate --scenarios nope --data-dir {data}": (UsageError, "--scenarios 'nope'"),
    "ablate --set nope=1 --data-dir {data}": (UsageError, "unknown setting nope"),
    "sync": (UsageError, "--s3-bucket"),
}
"""Each command line, with the error that ends it and a part of its message."""


def checkpoint(path: Path, **given) -> Path:
    settings = Settings(model="tiny", output_dir=path.parent, scenario="dual_lora")
    content = {
        "epoch": 1,
        "model_state_dict": {"weight": torch.zeros(3)},
        "settings": settings.model_dump(mode="json"),
        "base_model": {"name": "tiny", "fingerprint": "f"},
        **given,
    }
    save_checkpoint(path, content)
    return path


@pytest.fixture(scope="module")
def places(catalogue, tmp_path_factory):
    """What the command lines name in braces."""
    root = tmp_path_factory.mktemp("places")
    for name in ("files", "bert", "pointer", "broken/train", "run", "changed", "taken"):
        (root / name).mkdir(parents=True)
    (root / "files" / "some.txt").write_text("words")
    (root / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (root / "pointer" / "config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    (root / "broken" / "train" / "0.tar").write_bytes(b"\0" * 100)
    write_shard(root / "broken" / "val" / "0.tar", range(2))
    torch.save({"epoch": 1, "state_dict": {}}, root / "foreign.pt")
    torch.save(
        {**torch.load(checkpoint(root / "newer.pt")), "format_version": 99}, root / "newer.pt"
    )
    gone = Settings(model="./gone", scenario="dual_lora").model_dump(mode="json")
    checkpoint(root / "orphan.pt", settings=gone)
    checkpoint(root / "run" / "best.pt")
    checkpoint(root / "weights" / "dual_lora_checkpoint.pt", step=3)
    checkpoint(root / "changed" / "dual_lora_checkpoint.pt", step=0, before={})
    with run_lock(root / "taken" / "dual_lora"):
        named = {p.stem: p for p in root.iterdir()} | {"data": catalogue, "new": root / "new"}
        named["weights"] = root / "weights" / "dual_lora_checkpoint.pt"
        yield {name: str(path) for name, path in named.items()}


@pytest.fixture(scope="module")
def ended(places, tmp_path_factory):
    """How every command line of ``REFUSED`` ended: its exit code, slow libraries, and output."""
    lines = [[part.format(**places) for part in line.split()] for line in REFUSED]
    folder = tmp_path_factory.mktemp("elsewhere")
    return dict(zip(REFUSED, in_forks(lines, SLOW, folder, "clipft.cli.preflight"), strict=True))


@pytest.mark.parametrize("line", REFUSED)
def test_it_is_refused_before_torch_is_imported(line, ended, places):
    error, message = REFUSED[line]
    code, slow, said = ended[line]
    assert message.format(**places) in " ".join(said.split())
    assert code == error.exit_code
    assert not slow
    assert "Traceback" not in said
    assert not Path(places["new"]).exists()


NEEDLESS = ("bitsandbytes", "sklearn", "wandb", "pandas", "onnx", "webdataset")
"""Libraries that training a small model on a CPU has no use for."""

TRAIN = f"""
import gc, sys
from clipft.cli.app import run
code = run(sys.argv[1:])
print(code, [name for name in {NEEDLESS} if name in sys.modules])
print("collects" if gc.isenabled() else "does not collect")
"""


def test_training_imports_nothing_that_it_does_not_need(catalogue, tmp_path):
    args = ["train", "--data-dir", str(catalogue), "--output-dir", str(tmp_path), *TINY]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, *args, "--device", "cpu"], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-2:] == ["0 []", "collects"], done.stdout + done.stderr


def test_peft_finds_bitsandbytes_again(monkeypatch):
    """It is hidden while clipft makes adapters, and not from the rest of the process."""
    from peft import import_utils

    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    assert import_utils.is_bnb_available()
    with without_bitsandbytes():
        assert not import_utils.is_bnb_available()
    assert import_utils.is_bnb_available()
    assert "bitsandbytes" not in sys.modules
