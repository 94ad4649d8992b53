"""Every command ends with the next command to type, from raw files to a search."""

import json
import shlex
from pathlib import Path

import pytest

from clipft.cli.app import run
from clipft.data.demo.catalogue import render_pair
from tests.conftest import jpeg

FAST = ["--num-workers", "0", "--device", "cpu", "--precision", "fp32"]
RUN = ["--mini-train", *FAST]


def stderr_lines(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def next_command(lines: list[str]) -> list[str]:
    commands = [line.removeprefix("Next: ") for line in lines if line.startswith("Next: ")]
    assert len(commands) == 1, lines
    words = shlex.split(commands[0])
    assert words[0] == "clipft"
    return words[1:]


@pytest.fixture
def raw(tmp_path) -> Path:
    folder = tmp_path / "my photos"  # a space: words must be quoted
    folder.mkdir()
    for number in range(80):
        pair = render_pair(7, number)
        (folder / f"{number}.jpg").write_bytes(jpeg(pair))
        (folder / f"{number}.txt").write_text(pair.caption)
    return folder


def test_each_command_leads_to_the_next(raw, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPFT_MODEL", "tiny")
    way = ["pack"]
    assert run(["pack", str(raw), "./my catalogue", "--near", "-1", "--val-share", "0.3"]) == 0
    more = {"inspect": FAST[:2], "zero-shot": FAST, "train": RUN, "evaluate": FAST}
    words = next_command(stderr_lines(capsys))
    while words[0] not in way or words[0] == "train":
        way.append(words[0])
        options = [] if "--mini-train" in words else more.get(words[0], [])
        assert run([*words, *options]) == 0, words
        lines = stderr_lines(capsys)
        if words[0] == "search":
            break
        words = next_command(lines)
    assert way == [
        *("pack", "inspect", "zero-shot", "train", "train"),
        *("evaluate", "export", "search"),
    ]


def test_the_files_named_under_made_exist(catalogue, tmp_path, capsys):
    args = ["train", *RUN, "--model", "tiny", "--data-dir", str(catalogue)]
    assert run([*args, "--output-dir", str(tmp_path)]) == 0
    lines = stderr_lines(capsys)
    first = next(i for i, line in enumerate(lines) if line.startswith("Made: "))
    made = [line[6:].rpartition(" ")[2] for line in lines[first : first + 3]]
    assert [Path(place).exists() for place in made] == [True] * 3


def test_json_output_has_no_closing_lines(catalogue, tmp_path, capsys):
    args = ["inspect", str(catalogue), "--model", "tiny", "--num-workers", "0", "--json"]
    assert run([*args, "--html", str(tmp_path / "page.html")]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)
    assert "Made:" not in captured.err and "Next:" not in captured.err


def test_the_next_command_repeats_the_settings_file(catalogue, tmp_path, capsys):
    file = tmp_path / "my run.toml"
    file.write_text(f'model = "tiny"\ndata_dir = "{catalogue}"\nnum_workers = 0\n')
    assert run(["doctor", "--config", str(file), "--lr", "1e-3", "--device", "cpu"]) == 0
    words = next_command(stderr_lines(capsys))
    assert words[:3] == ["train", "--config", str(file)]
    assert "--lr" in words and words[-1] == "--plan"
