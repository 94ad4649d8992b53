"""Secrets are not leaked, the network is not used without need, and data is never executed."""

import os
import sys
from pathlib import Path

import pytest

from clipft.cli.app import run
from tests import warm
from tests.faults.helpers import one_error
from tests.faults.outside import ROOT
from tests.tiny_run import TINY

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDSECRET001",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+of/aws0002",
    "AWS_SESSION_TOKEN": "plantedsessiontoken0003",
    "WANDB_API_KEY": "plantedkeyofwandb00000000000000000000004",
    "HF_TOKEN": "hf_plantedTokenOfTheHub0005",
}
URL = "https://planteduser0006:plantedpassword0007@localhost:9"


def leaks(text: bytes) -> list[str]:
    planted = [*SECRETS.values(), "planteduser0006", "plantedpassword0007"]
    return [secret for secret in planted if secret.encode() in text]


def assert_none_in(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = {str(path): leaks(path.read_bytes()) for path in files}
    assert files and not any(found.values()), {k: v for k, v in found.items() if v}


@pytest.fixture
def planted(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def test_a_run_writes_secrets_to_no_file_and_no_output(planted, catalogue, tmp_path, capfd):
    where = ["--data-dir", str(catalogue), "--output-dir", str(tmp_path / "out")]
    assert run(["train", *TINY, *where, "--wandb", "offline", "--debug", "--json"]) == 0
    folder = str(tmp_path / "out" / "dual_lora")
    assert run(["evaluate", folder, "--data-dir", str(catalogue), "--json"]) == 0
    assert run(["export", folder, str(tmp_path / "exported"), "--format", "transformers"]) == 0
    assert run(["settings", "--json"]) == 0
    said = capfd.readouterr()
    assert not leaks((said.out + said.err).encode())
    assert_none_in(tmp_path)


def test_secrets_are_in_no_traceback(planted, tmp_path, capfd):
    """The traceback is that of an unreachable bucket, with --debug."""
    place = ["--s3-bucket", "b", "--endpoint-url", "http://127.0.0.1:9", "--s3-retry-timeout", "0"]
    assert run(["sync", *place, "--data-dir", str(tmp_path / "data"), "--debug"]) == 4
    said = capfd.readouterr()
    assert "Traceback" in said.err
    assert not leaks((said.out + said.err).encode())


@pytest.mark.parametrize("where", ["flag", "environment", "file"])
def test_a_url_with_a_password_is_refused_and_not_repeated(tmp_path, monkeypatch, capsys, where):
    args = ["settings"]
    if where == "flag":
        args = ["sync", "--endpoint-url", URL, "--s3-bucket", "b"]
    elif where == "environment":
        monkeypatch.setenv("CLIPFT_ENDPOINT_URL", URL)
    else:
        (tmp_path / "c.toml").write_text(f'endpoint_url = "{URL}"\n')
        args += ["--config", str(tmp_path / "c.toml")]
    assert run(args) == 2
    error, hint = one_error(capsys)
    assert "must not contain a user name or a password" in error
    assert not leaks((error + hint).encode())


WITHOUT_NETWORK = """
import socket, sys
asked = []
def refuse(*args, **more):
    asked.append(args)
    raise OSError("the network was asked")
real = socket.socket
class Local(real):
    def connect(self, address):
        if self.family != socket.AF_UNIX: refuse(address)
        return super().connect(address)
    def connect_ex(self, address):
        if self.family != socket.AF_UNIX: refuse(address)
        return super().connect_ex(address)
socket.socket = Local
socket.getaddrinfo = refuse
from clipft.cli.app import run
code = run(sys.argv[1:])
assert not asked, asked
sys.exit(code)
"""


def test_a_run_on_local_data_does_not_use_the_network(catalogue, tmp_path):
    args = ["train", *TINY, "--data-dir", str(catalogue), "--output-dir", str(tmp_path)]
    environ = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environ |= {"OMP_NUM_THREADS": "1", "CLIPFT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", WITHOUT_NETWORK, *args]
    done = warm.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_source_runs_no_foreign_code():
    """Calls that ruff's S rules (from bandit) do not forbid, but that could run foreign code."""
    forbidden = (
        "trust_remote_code=True",
        "weights_only=False",
        "pickle.load",
        "os.system(",
        "shell=True",
        "yaml.load(",
        "marshal.load",
        "allow_pickle=True",
    )
    for path in (ROOT / "clipft").rglob("*.py"):
        text = path.read_text()
        assert not [name for name in forbidden if name in text], path
