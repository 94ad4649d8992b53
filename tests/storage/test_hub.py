"""``--push`` and ``hf://`` against a server on loopback that speaks the hub's protocol."""

import base64
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from clipft.cli.app import run
from clipft.core.errors import UsageError
from clipft.data.shards.folders import open_pairs
from clipft.storage.hub import HubUrl, parse_hub_url
from tests import warm
from tests.data.packing.pack_helpers import pattern

TOKEN = "hf_secretsecretsecretsecretsecretse"


COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """Takes every file as a regular one; ``refuses`` is the status of all answers, if set, and
    ``why`` the hub's code for the reason. ``serves`` are the files of the data set me/furniture,
    and ``card`` is what its card says."""

    def __init__(self, refuses: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.refuses, self.why = refuses, ""
        self.serves: dict[str, bytes] = {}
        self.card: dict[str, Any] = {}
        self.deleted: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        size = self.headers.get("Content-Length")
        body = self.rfile.read(int(size)) if size else self._chunks()
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.refuses:
            self._say(self.server.refuses, {"error": "no"})
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._say(200, {"url": f"{self.server.url}/me/my-clip", "id": "me/my-clip"})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked
            ]
            self._say(200, {"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    self.server.deleted.append(value["path"])
            url = f"{self.server.url}/me/my-clip/commit/{'a' * 40}"
            self._say(200, {"success": True, "commitOid": "a" * 40, "commitUrl": url})
        else:
            self._say(200, {})

    def do_GET(self) -> None:
        files, path = self.server.serves, self.path.partition("?")[0]
        name = path.partition("/resolve/")[2].partition("/")[2]
        if self.server.refuses:
            self._say(self.server.refuses, {"error": self.server.why})
        elif name in files:
            self._send(200, files[name], "application/octet-stream")
        elif "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": name}
                for name, data in (files or self.server.files).items()
            ]
            self._send(200, json.dumps(tree).encode(), "application/json")
        else:
            siblings = [{"rfilename": name} for name in files or self.server.files]
            info = {"id": "me/furniture", "sha": COMMIT, "siblings": siblings, "tags": []}
            self._say(200, {**info, "cardData": self.server.card})

    do_HEAD = do_GET

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _say(self, status: int, content: dict[str, Any]) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "ETag": f'"{hashlib.sha1(body).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "X-Error-Code": self.server.why,
        }
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


PUSHING = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
    del sys.modules[name]  # it reads its settings once, at import
from pathlib import Path
from clipft.core.errors import ClipftError
from clipft.storage.hub import make_repository, push
try:
    folder, repo, kind, *own = sys.argv[1:]
    print(push(Path(folder), make_repository(repo, kind), kind, own))
except ClipftError as error:
    print(error.exit_code, error.message, error.hint)
"""


def push(
    endpoint: str,
    folder: Path,
    repo: str = "me/my-clip",
    kind: str = "model",
    own: Sequence[str] = (),
    **environment: str,
) -> str:
    """In a process with settings of its own for huggingface_hub."""
    kept = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    given = {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-c", PUSHING, str(folder), repo, kind, *own]
    done = warm.run(command, capture_output=True, text=True, env={**kept, **given})
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "1_Normalize").mkdir()
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (tmp_path / "1_Normalize" / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    return tmp_path


def test_the_whole_folder_is_uploaded_to_a_private_repository(hub, folder):
    assert push(hub.url, folder) == f"{hub.url}/me/my-clip"
    made = hub.created[0]
    assert made.get("private") is True or made.get("visibility") == "private"
    ours = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert hub.files == ours
    assert hub.tokens == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("status", [401, 403])
def test_missing_permission_is_reported(status, hub, folder):
    hub.refuses = status
    printed = push(hub.url, folder)
    assert printed.startswith(f"5 cannot push to me/my-clip: the hub answers {status}")
    assert "hf auth login" in printed
    assert not hub.files


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_missing_network_is_reported(offline, folder):
    printed = push("http://127.0.0.1:9", folder, HF_HUB_OFFLINE=offline)
    assert printed.startswith("5 cannot push to me/my-clip: ")


def test_an_invalid_name_is_reported(folder):
    assert push("http://127.0.0.1:9", folder, "a//b").startswith(
        "2 --push a//b: not a valid repository name"
    )


def test_a_data_set_is_updated_and_its_old_files_are_deleted(hub, folder):
    hub.files = {"images/old.parquet": b"", "images/new.parquet": b"", "other/a.parquet": b""}
    (folder / "images").mkdir()
    (folder / "images" / "new.parquet").write_bytes(b"rows")
    page = push(hub.url, folder, kind="dataset", own=["images/*.parquet"])
    assert page == f"{hub.url}/datasets/me/my-clip"
    assert hub.created[0]["type"] == "dataset"
    assert hub.deleted == ["images/old.parquet"]
    assert hub.files["images/new.parquet"] == b"rows"


@pytest.fixture
def online(hub, tmp_path, monkeypatch) -> Hub:
    """The hub as this process sees it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return hub


def pack(out: Path, source: str = "hf://datasets/me/furniture") -> int:
    return run(["pack", source, str(out), "--processes", "1"])


def parquet(numbers: Iterable[int]) -> bytes:
    """A table as ``push_to_hub`` of datasets writes it."""
    import pyarrow
    from pyarrow.parquet import write_table

    images = []
    for number in numbers:
        buffer = io.BytesIO()
        pattern(number).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    rows = {"image": images, "text": [f"thing {n}" for n in numbers]}
    buffer = io.BytesIO()
    write_table(pyarrow.table(rows), buffer)
    return buffer.getvalue()


def test_a_data_set_of_the_hub_is_packed_with_its_splits(online, tmp_path):
    online.serves = {
        "README.md": b"",
        "data/train-00000-of-00001.parquet": parquet(range(12)),
        "data/validation-00000-of-00001.parquet": parquet(range(20, 24)),
    }
    assert pack(tmp_path / "out") == 0
    assert len(open_pairs(tmp_path / "out" / "train")) == 12
    assert len(open_pairs(tmp_path / "out" / "val")) == 4


@pytest.mark.parametrize(
    ("status", "why", "says"),
    [
        (404, "RepoNotFound", "the hub has no data set me/furniture, or it is private"),
        (403, "GatedRepo", "hf://datasets/me/furniture is gated"),
    ],
)
def test_a_missing_or_gated_data_set_is_one_line_and_nothing_is_written(
    status, why, says, online, tmp_path, capsys
):
    online.refuses, online.why = status, why
    assert pack(tmp_path / "out") == 5
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error == f"error: {says}"
    assert "hf auth login" in hint
    assert not (tmp_path / "out").exists()


def test_a_data_set_with_several_configurations_needs_a_folder(online, tmp_path, capsys):
    online.serves = {"en/train-0.parquet": parquet(range(4)), "de/train-0.parquet": b"broken"}
    online.card = {"configs": [{"config_name": name, "data_files": "*"} for name in ("en", "de")]}
    assert pack(tmp_path / "out") == 2
    assert "has several configurations: en, de" in capsys.readouterr().err
    assert pack(tmp_path / "out", "hf://datasets/me/furniture/en") == 0
    assert len(open_pairs(tmp_path / "out" / "train")) == 4


def test_embeddings_are_uploaded_as_a_private_data_set(online, catalogue, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    out, given = tmp_path / "out", ["--texts", "--push", "me/my-clip", "--num-workers", "0"]
    assert run(["embed", "tiny", str(catalogue / "val"), str(out), *given]) == 0
    made = online.created[0]
    assert made["type"] == "dataset"
    assert made.get("private") is True or made.get("visibility") == "private"
    assert online.files == {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file()
    }
    monkeypatch.delenv("HF_TOKEN")
    online.refuses, online.files = 401, {}
    assert run(["embed", "tiny", str(catalogue / "val"), str(tmp_path / "other"), *given]) == 5
    assert not (tmp_path / "other").exists(), "it is refused before the work"


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("hf://datasets/me/x", HubUrl("me/x")),
        ("hf:/datasets/me/x/", HubUrl("me/x")),  # as a Path has it
        ("hf://datasets/me/x@v1/data/en", HubUrl("me/x", "v1", "data/en")),
        ("hf://datasets/me/x@~parquet", HubUrl("me/x", "refs/convert/parquet")),
        ("hf://datasets/me/x@refs/pr/2/data", HubUrl("me/x", "refs/pr/2", "data")),
        ("s3://bucket/prefix", None),
        ("hf-data", None),
    ],
)
def test_addresses_of_the_hub(text, parsed):
    assert parse_hub_url(text) == parsed


@pytest.mark.parametrize("text", ["hf://datasets/x", "hf://me/x", "hf://datasets/@v1", "hf://"])
def test_wrong_addresses_of_the_hub_are_refused(text):
    with pytest.raises(UsageError, match="not a data set of the hub"):
        parse_hub_url(text)
