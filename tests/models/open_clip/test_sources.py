"""Checkpoints are found on the hub, in open_clip's registry, and in folders."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from clipft.core.errors import ModelError
from clipft.models.open_clip.names import CONFIG_FILE
from clipft.models.open_clip.schema import read_config
from clipft.models.open_clip.sources import find_source
from tests.models.open_clip.folders import CONFIG, describe, write


class Hub(ThreadingHTTPServer):
    """Serves the folders in ``root`` as repositories. ``me/gated`` is gated, others are unknown."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.root = root


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        repo, _, file = self.path.lstrip("/").partition("/resolve/main/")
        path = self.server.root / repo / file
        if repo == "me/gated":
            self._refuse(403, "GatedRepo")
        elif not path.parent.is_dir():
            self._refuse(404, "RepoNotFound")
        elif not path.is_file():
            self._refuse(404, "EntryNotFound")
        else:
            data = path.read_bytes()
            self.send_response(200)
            headers = {"ETag": f'"{len(data)}"', "X-Repo-Commit": "a" * 40}
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def hub(tmp_path) -> Iterator[str]:
    server = Hub(tmp_path / "hub")
    write(tmp_path / "hub" / "me" / "good")
    (tmp_path / "hub" / "me" / "transformers").mkdir()
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


LOADING = """
import json, sys
import open_clip
from open_clip import pretrained
from clipft.core.errors import ClipftError
from clipft.models.pretrained import load_pretrained
from tests.models.open_clip.folders import CONFIG

open_clip.factory._MODEL_CONFIGS["ViT-tiny"] = CONFIG
pretrained._PRETRAINED["ViT-tiny"] = {
    "good": pretrained._pcfg(hf_hub="me/good/"),
    "quick": pretrained._pcfg(hf_hub="me/good/open_clip_pytorch_model.bin", quick_gelu=True),
    "gated": pretrained._pcfg(hf_hub="me/gated/"),
}
said = {}
for name in sys.argv[1:]:
    try:
        base = load_pretrained(name)
        said[name] = [0, base.conversion, base.model.config.vision_config.hidden_act]
    except ClipftError as error:
        said[name] = [error.exit_code, error.message, error.hint]
print(json.dumps(said))
"""


def load(endpoint: str, home: Path, *names: str, **more: str) -> dict[str, list]:
    """In a process of its own: huggingface_hub reads its settings once, at import."""
    kept = {k: v for k, v in os.environ.items() if k not in {"HF_HUB_OFFLINE", "HF_TOKEN"}}
    given = {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home / "hf")}
    given |= more
    command = [sys.executable, "-c", LOADING, *names]
    done = subprocess.run(command, capture_output=True, text=True, env={**kept, **given})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_models_of_the_hub_load_or_are_refused_in_one_line(hub, tmp_path):
    good = ["hf-hub:me/good", "open_clip:ViT-tiny/good", "open_clip:ViT-tiny/quick"]
    bad = {
        "hf-hub:me/gated": "me/gated is a gated model",
        "hf-hub:me/missing": "the hub has no model me/missing",
        "me/gated": "me/gated is a gated model",
        "me/missing": "the hub has no model me/missing",
        "hf-hub:a//b": "the hub has no model a//b",
        "hf-hub:me/transformers": f"me/transformers has no {CONFIG_FILE}: it is not",
        "open_clip:ViT-tiny/gated": "me/gated is a gated model",
    }
    said = load(hub, tmp_path, *good, *bad)
    for name in good:
        assert said[name][:2] == [0, said[good[0]][1]], said[name]
        assert said[name][1].startswith(
            "62 of 62 tensors used, largest difference from open_clip's"
        )
    # Only the tag knows that its weights were trained with QuickGELU
    assert [said[name][2] for name in good] == ["gelu", "gelu", "quick_gelu"]
    for name, message in bad.items():
        code, text, hint = said[name]
        assert code == 5 and text.startswith(message) and hint and "\n" not in text + hint


def test_a_missing_network_is_reported():
    error = refusal("hf-hub:me/good")  # the tests are offline
    assert str(error).startswith("cannot get model hf-hub:me/good: ")
    assert "HF_ENDPOINT" in error.hint


def refusal(name: str) -> ModelError:
    with pytest.raises(ModelError) as raised:
        find_source(name)
    return raised.value


def test_names_that_the_registry_lacks_are_refused_with_the_nearest():
    error = refusal("open_clip:ViT-B32/openai")
    assert str(error) == "open_clip has no model 'ViT-B32'" and "ViT-B-32" in error.hint
    error = refusal("open_clip:ViT-B-32/openia")
    assert str(error) == "open_clip has no pretrained weights 'openia' for ViT-B-32"
    assert error.hint.startswith("did you mean openai?") and "laion2b_s34b_b79k" in error.hint
    error = refusal("open_clip:ViT-S-32/x")
    assert "name a file: open_clip:ViT-S-32/FILE" in error.hint
    assert "no pretrained weights ''" in str(refusal("open_clip:ViT-B-32"))


def test_folders_that_are_not_complete_are_refused(tmp_path):
    assert str(refusal(f"local-dir:{tmp_path}")) == f"{tmp_path / CONFIG_FILE} is missing"
    (tmp_path / CONFIG_FILE).write_text('{"model_cfg": {"embed_dim": 3}}')
    assert "does not describe a model of open_clip" in str(refusal(f"local-dir:{tmp_path}"))
    describe(tmp_path, CONFIG)
    assert str(refusal(f"local-dir:{tmp_path}")) == f"no weights in {tmp_path}"
    assert str(refusal(f"local-dir:{tmp_path}/x")) == f"there is no model {tmp_path}/x"
    assert str(refusal(f"{tmp_path}/x.pt")) == f"there is no model {tmp_path}/x.pt"


@pytest.mark.parametrize("name", ["open_clip:", "hf-hub:", "local-dir:"])
def test_a_notation_without_a_name_is_refused(name):
    assert str(refusal(name)) == f"{name} is not followed by a name"


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.pt")
    assert str(refusal(str(tmp_path / "model.pt"))).startswith("there is no model ")


def test_weights_are_looked_for_in_the_order_of_open_clip(tmp_path):
    from open_clip.factory import _find_checkpoint_in_dir

    describe(tmp_path, CONFIG)
    for name in ("zzz.bin", "a.pth", "a.safetensors", "model.pth", "open_clip_pytorch_model.bin"):
        torch.save({}, tmp_path / name)
        found = find_source(f"local-dir:{tmp_path}")
        assert str(found.weights) == _find_checkpoint_in_dir(tmp_path)


@pytest.mark.parametrize(
    ("part", "name", "value", "problem"),
    [
        ("model_cfg", "embed_dim", "32", "valid integer"),
        ("vision_cfg", "layers", None, "valid integer"),
        ("vision_cfg", "patch_size", 7.5, "valid integer"),
        ("vision_cfg", "image_size", "large", "valid integer"),
        ("text_cfg", "heads", 0, "greater than 0"),
        ("model_cfg", "text_cfg", [], "valid dictionary"),
        ("preprocess_cfg", "mean", [0.5], "at least 3 items"),
        ("preprocess_cfg", "interpolation", "lanczos", "'bicubic', 'bilinear' or 'random'"),
        ("preprocess_cfg", "resize_mode", "crop", "'shortest', 'longest' or 'squash'"),
    ],
)
def test_a_configuration_with_a_wrong_value_is_refused_by_its_name(
    part, name, value, problem, tmp_path
):
    config = {"model_cfg": deepcopy(CONFIG), "preprocess_cfg": {}}
    {**config, **config["model_cfg"]}[part][name] = value
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    message = str(refusal(f"local-dir:{tmp_path}"))
    assert f"{name}: " in message and problem in message and "\n" not in message


def test_all_configurations_of_open_clip_are_read(tmp_path):
    import open_clip

    path = tmp_path / CONFIG_FILE
    for name in open_clip.list_models():
        config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": {}}
        path.write_text(json.dumps(config))
        assert read_config(path)["model_cfg"]["embed_dim"] == config["model_cfg"]["embed_dim"]
