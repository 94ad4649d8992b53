"""The system calls of a save: their order, and what is left if each of them is the last one.

Killing the process does not simulate a power cut. There, the order matters in which files are
flushed and renamed, which strace shows.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clipft.runs.checkpoint import load_newest
from tests import warm
from tests.faults.outside import ROOT, command

CALLS = "write,fsync,rename,link,unlink"
SAVER = """
import sys, os, signal
import torch
from pathlib import Path
from clipft.cli.app import run
from clipft.core.errors import StorageError
from clipft.runs.checkpoint import save_newest

def content(step):
    base = {"name": "tiny", "fingerprint": "0"}
    weights = {"w": torch.full((300,), float(step)), "v": torch.full((300,), float(step))}
    return {"epoch": 0, "model_state_dict": weights, "settings": {}, "base_model": base,
            "step": step}

def save(path, step):
    save_newest(Path(path), content(step))

for line in sys.stdin:
    path = line.strip()
    save(path, 1)
    save(path, 2)
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        os.kill(os.getpid(), signal.SIGSTOP)  # until it is traced
        try:
            save(path, 3)
        except StorageError:
            os._exit(4)
        except BaseException:
            os._exit(1)
        os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def strace() -> str:
    found = shutil.which("strace")
    if not found or subprocess.run([found, "-qq", "true"], capture_output=True).returncode:
        pytest.skip("needs strace, and the right to trace")
    return found


@pytest.fixture(scope="module")
def saver():
    process = warm.Popen(
        [sys.executable, "-c", SAVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ,
    )
    yield process
    process.stdin.close()
    process.wait(60)


def third_save(strace: str, saver, path: Path, fault: str) -> int:
    """Save steps 1 and 2, then step 3 with a fault in one system call, and return the exit code."""
    path.parent.mkdir(parents=True)
    saver.stdin.write(f"{path}\n")
    saver.stdin.flush()
    pid = int(saver.stdout.readline())
    tracer = subprocess.Popen(
        [strace, "-p", str(pid), "-e", f"trace={CALLS}", "-e", f"inject={fault}"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "attached" in tracer.stderr.readline()
    os.kill(pid, signal.SIGCONT)
    code = int(saver.stdout.readline())
    tracer.communicate(timeout=60)
    return code


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "steps_left"),
    [
        ("write", {2}),
        ("fsync", {2, 3}),  # the last one flushes the folder
        ("rename", {2}),
        ("link", {2}),
        ("unlink", {2}),
    ],
)
def test_a_kill_at_each_call_of_a_save_leaves_a_whole_checkpoint(
    strace, saver, tmp_path, call, steps_left
):
    killed = set()
    for number in range(1, 200):  # strace counts each call by itself
        path = tmp_path / str(number) / "a_checkpoint.pt"
        code = third_save(strace, saver, path, f"{call}:signal=KILL:when={number}")
        content = load_newest(path).content
        assert set(content["model_state_dict"]["w"].tolist()) == {content["step"]}
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed.add(content["step"])
    assert code == 0 and content["step"] == 3, "more calls than this test thought of"
    assert killed == steps_left


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        ("write", "ENOSPC", 4),
        ("fsync", "EIO", 4),
        ("rename", "EIO", 4),
        ("link", "EPERM", 0),  # a file system without links
    ],
)
def test_an_error_in_each_call_leaves_a_whole_checkpoint(
    strace, saver, tmp_path, call, error, told
):
    for number in (1, 2, 3):
        path = tmp_path / str(number) / "a_checkpoint.pt"
        code = third_save(strace, saver, path, f"{call}:error={error}:when={number}")
        assert code in (0, told)
        assert load_newest(path).content["step"] in ((3,) if code == 0 else (2, 3))
        assert not list(path.parent.glob(".*.part"))
        if number == 1:
            assert code == told


WHEN_TRACED = """
import pathlib, sys, time
while "TracerPid:\\t0" in pathlib.Path("/proc/self/status").read_text():
    time.sleep(0.01)
from clipft.cli.app import run
sys.exit(run(sys.argv[1:]))
"""
TRACED = re.compile(r"(write|fsync|rename|link)\((.*)\) += (-?\d+)")


def calls(trace: Path, out: Path) -> list[tuple[str, list[str]]]:
    """Return (call, paths below ``out``) in order; "" is the folder itself."""
    found = []
    for line in trace.read_text(errors="replace").splitlines():
        if (match := TRACED.search(line)) and match[3] != "-1":
            paths = re.findall(rf'[<"]{re.escape(str(out))}/?([^<>"]*)[>"]', match[2])
            if paths:
                found.append((match[1], paths))
    return found


def test_all_is_flushed_before_a_checkpoint_gets_its_name(strace, catalogue, whole, tmp_path):
    """Both its own bytes and the lines of its steps; the folder is flushed after it."""
    out, trace = tmp_path / "out", tmp_path / "trace"
    run = warm.Popen(
        [sys.executable, "-c", WHEN_TRACED, *command(catalogue, out, "--epochs", "1")],
        env={**os.environ, "CLIPFT_CACHE": str(whole / "cache")},
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = ["-p", str(run.pid), "-f", "-y", "-qq", "-s", "8", "-o", str(trace)]
    with subprocess.Popen([strace, *seen, "-e", "trace=write,fsync,rename,link"]):
        _, said = run.communicate(timeout=120)
    assert run.returncode == 0, said
    dirty, saves, unsettled = set(), 0, False
    metrics, final = "dual_lora/metrics.jsonl", "dual_lora_checkpoint.pt"
    temporary = f".{final}.part"
    for call, paths in calls(trace, out):
        if call == "write":
            dirty.add(paths[0])
        elif call == "fsync":
            dirty.discard(paths[0])
            unsettled &= paths[0] != ""
        elif call == "rename" and paths == [temporary, final]:
            assert metrics not in dirty and temporary not in dirty
            assert not unsettled, "the folder was not flushed after the save before"
            saves, unsettled = saves + 1, True
    assert saves == 4 and not unsettled  # of three steps, and at the end
