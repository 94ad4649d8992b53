"""``--push`` against a server on loopback that speaks the hub's protocol."""

import base64
import json
import os
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests import warm

TOKEN = "hf_secretsecretsecretsecretsecretse"


class Hub(ThreadingHTTPServer):
    """Takes every file as a regular one; ``refuses`` is the status of all answers, if set."""

    def __init__(self, refuses: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.refuses = refuses
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
                if line["key"] == "file":
                    value = line["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{self.server.url}/me/my-clip/commit/{'a' * 40}"
            self._say(200, {"success": True, "commitOid": "a" * 40, "commitUrl": url})
        else:
            self._say(200, {})

    def do_GET(self) -> None:
        self._say(self.server.refuses or 200, {"sha": "a" * 40, "siblings": [], "tags": []})

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _say(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
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
from clipft.export.export import make_repository, push
try:
    print(push(Path(sys.argv[1]), make_repository(sys.argv[2])))
except ClipftError as error:
    print(error.exit_code, error.message, error.hint)
"""


def push(endpoint: str, folder: Path, repo: str = "me/my-clip", **environment: str) -> str:
    """In a process with settings of its own for huggingface_hub."""
    kept = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    given = {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-c", PUSHING, str(folder), repo]
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
