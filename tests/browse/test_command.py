"""What can be refused is refused in one line; otherwise the address is printed and served."""

import http.client
import json
import os
import shutil
import signal
import sys
import threading
import time
from urllib.parse import urlsplit

import pytest

from clipft.browse.judging import Judging
from clipft.cli.app import run
from clipft.runs.folder import RunPaths
from tests.browse.conftest import TRAINED


def refused(capsys, *args: str) -> tuple[int, str]:
    code = run(["browse", *map(str, args), "--no-open"])
    return code, capsys.readouterr().err


def test_a_folder_without_a_run(tmp_path, capsys):
    code, said = refused(capsys, tmp_path)
    assert code == 2 and f"no run in {tmp_path}" in said


def test_data_that_is_not_there(trained, tmp_path, capsys):
    code, said = refused(capsys, trained, tmp_path / "nowhere")
    assert code == 3 and "no folder" in said


def test_a_run_that_trained_nothing(catalogue, tmp_path, capsys):
    args = ["--scenario", "zero_shot", "--data-dir", catalogue, "--output-dir", tmp_path]
    assert run(["train", *TRAINED, *map(str, args)]) == 0
    code, said = refused(capsys, tmp_path / "zero_shot")
    assert code == 2 and "no fine-tuned model to compare" in said


@pytest.mark.parametrize("name", ["starlette", "uvicorn"])
def test_without_the_extra(trained, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    code, said = refused(capsys, trained)
    assert code == 2
    assert f"needs {name}" in said and "pip install 'clipft[browse]'" in said


def test_a_run_without_its_weights(trained, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("settings.toml", "metrics.jsonl"):
        (folder / name).write_bytes((trained / name).read_bytes())
    code, said = refused(capsys, folder)
    assert code == 5 and f"no checkpoint in {folder}" in said


def test_the_report_tells_the_tally(trained, catalogue, comparison, tmp_path, capsys):
    folder = tmp_path / "dual_lora"
    shutil.copytree(trained, folder)
    judging = Judging(comparison, RunPaths(folder).judgments, 2, catalogue, range(96, 136))
    name, _ = judging.draw()
    judging.judge(name, "same")
    assert run(["report", str(folder)]) == 0
    sentence = judging.tally.sentence()
    assert sentence in capsys.readouterr().err
    assert sentence in (folder / "report.html").read_text(encoding="utf-8")
    assert json.loads((folder / "report.json").read_text())["judgments"]["same"] == 1


def test_the_address_is_printed_and_the_tally_when_it_ends(trained, capsys):
    """The command in this process; a thread asks for the page and then interrupts it."""
    seen: dict[str, object] = {}

    def visit() -> None:
        end = time.monotonic() + 60
        out = ""
        while "url" not in out and time.monotonic() < end:
            time.sleep(0.05)
            out += capsys.readouterr().out
        seen.update(json.loads(out))
        address = urlsplit(str(seen["url"]))
        connection = http.client.HTTPConnection(address.netloc, timeout=30)
        connection.request("GET", f"{address.path}state")
        seen["state"] = json.loads(connection.getresponse().read())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=visit)
    thread.start()
    assert run(["browse", str(trained), "--no-open", "--json"]) == 0
    thread.join()
    state = seen["state"]
    assert (seen["images"], state["images"], state["held_out"]) == (136, 136, 40)
    assert "ean recall" in state["verdict"]
    assert "Nothing has been judged yet." in capsys.readouterr().err
