"""``clipft soup``: what it keeps, and that its result is a checkpoint like any other."""

import json
import shutil
from pathlib import Path

import pytest

from clipft.cli.app import run
from clipft.config.settings import Settings
from clipft.evaluation.soup import make as soup_module
from clipft.evaluation.soup.mixing import Member
from clipft.runs.checkpoint import load_checkpoint
from tests.conftest import write_shard

SMALL = ("--num-workers", "0", "--precision", "fp32", "--device", "cpu")


@pytest.fixture(scope="module")
def home(catalogue, tmp_path_factory) -> Path:
    """Two runs that differ by seed and rank, and the test pairs that no run has seen."""
    folder = tmp_path_factory.mktemp("soup")
    shutil.copytree(catalogue, folder / "catalogue")
    write_shard(folder / "catalogue" / "test" / "0.tar", range(2000, 2030))
    for seed in ("1", "2"):
        small = ("--mini-train", "--resamples", "20", "--lr", "3e-3", "--seed", seed)
        where = ("--data-dir", str(folder / "catalogue"), "--output-dir", str(folder / seed))
        options = ("--lora-r", "8") if seed == "2" else ()
        assert run(["train", "--model", "tiny", *small, *where, *options, *SMALL]) == 0
    return folder


def soup(home: Path, target: Path, *options: str) -> int:
    members = (str(home / "1" / "dual_lora"), str(home / "2" / "dual_lora"))
    return run(["soup", *members, "--output-dir", str(target), *options, *SMALL])


def test_the_soup_is_measured_on_test_pairs_and_opens_like_a_run(home, tmp_path, capsys):
    target = tmp_path / "soup"
    assert soup(home, target, "--uniform", "--json", "--resamples", "100") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["split"] == "test" and len(found["kept"]) == 2
    assert json.loads((target / "soup.json").read_text())["members"] == found["members"]
    recalls = [member["recall"] for member in found["members"]]
    assert recalls == sorted(recalls, reverse=True)
    change = found["to_best_member"]
    assert change["value"] == pytest.approx(
        found["soup"]["recall"] - found["best_member"]["recall"]
    )
    assert change["low"] <= change["value"] <= change["high"]

    content = load_checkpoint(target / "best.pt")
    assert content["settings"]["lora_r"] == 24 and "optimizer_state_dict" not in content
    assert run(["evaluate", str(target), "--json", *SMALL]) == 0
    evaluated = json.loads(capsys.readouterr().out)["evaluation"]
    assert evaluated["after"]["recall"] == pytest.approx(found["soup"]["recall"], abs=1e-6)
    assert run(["export", str(target), str(tmp_path / "clip")]) == 0
    where = ("--data-dir", str(home / "catalogue"), "--output-dir", str(tmp_path / "next"))
    model = str(tmp_path / "clip")
    assert run(["train", "--model", model, "--mini-train", *where, *SMALL]) == 0
    assert soup(home, target, "--resamples", "20") == 0  # replaces the soup


def test_the_answer_fits_a_screen(home, tmp_path, capsys):
    assert soup(home, tmp_path / "soup", "--resamples", "50") == 0
    printed = capsys.readouterr()
    lines = printed.out.rstrip().splitlines()
    assert sum(-(-max(1, len(line)) // 80) for line in lines) <= 24
    assert max(len(line) for line in lines[1:]) <= 80  # the first is a sentence, which wraps
    assert "best run" in printed.out and "pretrained" in printed.out


def test_mistakes_are_refused(home, tmp_path, capsys):
    one = str(home / "1" / "dual_lora")
    target = ("--output-dir", str(tmp_path / "soup"))

    def refused(*args: str) -> str:
        assert run(["soup", *args]) == 2
        return capsys.readouterr().err

    assert "at least two runs" in refused(one, *target)
    assert "is named twice" in refused(one, f"{one}/best.pt", *target)
    assert "--output-dir" in refused(one, str(home / "2" / "dual_lora"))
    held = str(home / "2" / "dual_lora")
    assert "holds a run" in refused(one, held, "--output-dir", held)
    assert run(["soup", one, str(tmp_path / "nowhere"), *target]) == 5
    assert not (tmp_path / "soup").exists()


def greedy(monkeypatch, recalls: dict[str, tuple[float, bool | None]]):
    """Choose among members a, b and c, where ``recalls`` has that of each soup, and whether it is
    clearly different from the best so far."""

    class Found:
        pairs = 10

        def __init__(self, name: str) -> None:
            self.name = name

        def recall(self) -> float:
            return recalls[self.name][0]

    class Pairs:
        split = "val"

        def evaluate(self, loaded):
            return type("Evaluated", (), {"evaluation": Found(loaded)})

    def change(after, before):
        value = after.recall() - before.recall()
        return {"value": value, "clear": recalls[after.name][1]}

    members = [Member(Path(name), Path(name), Settings(model="tiny")) for name in "abc"]
    monkeypatch.setattr(soup_module, "recall_difference", change)
    monkeypatch.setattr(soup_module, "_load", lambda chosen: "".join(str(m.run) for m in chosen))
    measured = sorted(((Found(n), m) for n, m in zip("abc", members, strict=True)), key=key)
    return [
        str(tried.member.run)
        for tried in soup_module.choose(measured, Pairs(), lambda note: None)
        if tried.kept
    ]


def key(found):
    return -found[0].recall()


ALONE = {"a": (0.5, None), "b": (0.7, None), "c": (0.6, None)}


def test_a_run_is_kept_unless_the_soup_with_it_is_clearly_worse(monkeypatch):
    worse = {**ALONE, "bc": (0.65, True), "ba": (0.69, False)}
    assert greedy(monkeypatch, worse) == ["b", "a"]
    better = {**ALONE, "bc": (0.8, True), "bca": (0.75, True)}
    assert greedy(monkeypatch, better) == ["b", "c"]
    unknown = {**ALONE, "bc": (0.69, None), "ba": (0.7, None)}  # without resamples
    assert greedy(monkeypatch, unknown) == ["b", "a"]
