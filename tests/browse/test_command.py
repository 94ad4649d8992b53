"""What can be refused is refused in one line; otherwise the address is printed and served."""

import http.client
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from clipft.browse.judging import Judging
from clipft.cli.app import run
from clipft.runs.folder import RunPaths
from tests import warm
from tests.browse.conftest import TRAINED


def refused(capsys, *args: str) -> tuple[int, str]:
    code = run(["browse", *map(str, args), "--no-open"])
    return code, capsys.readouterr().err


def test_a_folder_without_a_run(tmp_path, capsys):
    code, said = refused(capsys, tmp_path)
    assert code == 2 and f"no run in {tmp_path}" in said


def test_a_run_is_meant_by_its_files_and_by_the_folder_above(trained, capsys):
    for given in (trained / "best.pt", trained.parent / "dual_lora_checkpoint.pt", trained.parent):
        code, said = refused(capsys, given)
        assert code == 2 and f"did you mean {trained}?" in " ".join(said.split())
        assert ("is a file, not a run folder" in said) == given.is_file()


def test_data_that_is_a_file(trained, tmp_path, capsys):
    (tmp_path / "photo.jpg").write_bytes(b"")
    code, said = refused(capsys, trained, tmp_path / "photo.jpg")
    assert code == 3 and "photo.jpg is a file, not a folder" in said


def test_data_that_is_not_there(trained, tmp_path, capsys):
    code, said = refused(capsys, trained, tmp_path / "nowhere")
    assert code == 3 and "no folder" in said


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
def test_the_images_of_the_run_are_gone(trained, tmp_path, monkeypatch, capsys, relative):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    was = Path("shop/data") if relative else tmp_path / "shop" / "data"
    text = (folder / "settings.toml").read_text()
    line = re.search("^data_dir = .*$", text, re.M)[0]
    (folder / "settings.toml").write_text(text.replace(line, f'data_dir = "{was}"'))
    code, said = refused(capsys, folder)
    said = " ".join(said.split())
    assert code == 3 and f"the run was trained on {was}, which does not exist here" in said
    assert ("go to the folder where it was trained" in said) == relative
    assert f"`clipft browse {folder} DATA`" in said


BROWSER = """#!{python}
import http.client, json, os, pathlib, signal, sys, urllib.parse
address = urllib.parse.urlsplit(sys.argv[1])
def get(path):
    connection = http.client.HTTPConnection(address.netloc, timeout=30)
    connection.request("GET", path)
    reply = connection.getresponse()
    return reply.status, reply.headers["location"], reply.read().decode()
first = get(address.path)
found = [sys.argv[1], first, get(first[1]), get(address.path)]
pathlib.Path({seen!r}).write_text(json.dumps(found))
os.kill(os.getppid(), signal.SIGINT)
"""
"""Goes where it is sent, and once more; then it ends clipft, which has started it."""


def test_the_browser_is_opened_with_an_address_that_works_once(trained, tmp_path):
    """This one returns only at its end, as some do, and the page is served meanwhile."""
    browser, seen = tmp_path / "browser", tmp_path / "seen"
    browser.write_text(BROWSER.format(python=sys.executable, seen=str(seen)))
    browser.chmod(0o755)
    done = warm.run(
        [sys.executable, "-m", "clipft", "browse", str(trained), "--json"],
        env={**os.environ, "BROWSER": f"{browser} %s"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)["url"]
    address, first, page, again = json.loads(seen.read_text())
    assert (first[0], page[0], again[0]) == (303, 200, 403)
    assert printed.endswith(first[1]) and first[1].strip("/") not in address
    assert "<title>clipft browse</title>" in page[2]


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
