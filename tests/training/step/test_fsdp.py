"""A run with sharded weights has the same figures and takes a part of the memory."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from clipft.core.errors import ModelError
from clipft.distributed.collectives import ALONE
from tests.conftest import write_shard
from tests.models.checkpoints import write_siglip
from tests.training.process_helpers import results, start_all
from tests.training.step.sharded_runs import Run, figures

CLOSE = {"rel": 1e-5, "abs": 1e-6}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """45 pairs, 3 of them bad: one process alone has the pairs of the last step."""
    folder = tmp_path_factory.mktemp("uneven")
    write_shard(folder / "train" / "00000.tar", range(45), bad=(4, 17, 33))
    write_shard(folder / "val" / "00000.tar", range(1000, 1021))
    return folder


WAYS = {
    "graphs kept": {},
    "some graphs kept, of which one process could keep more": {"graph_memory": 0.01},
    "no graphs kept": {"graph_memory": 0, "gradient_checkpointing": True},
    "local": {"accumulation": "local", "positives": "caption"},
    "siglip": {"layer_decay": 0.8},
    "averages, and embeddings that are held": {"ema": 0.5, "preserve": 3.0},
}
IN_TWO = """
    from pathlib import Path
    from tests.training.step.sharded_runs import figures
    result = {{}}
    for way, given in json.loads({ways!r}).items():
        if rank == 1 and given.get("graph_memory"):
            given["graph_memory"] *= 2
        left = Path({folder!r}) / f"{{way}}.pt"
        result[way] = figures({{**given, "shard_weights": True}}, processes, left)
"""


@pytest.fixture(scope="module")
def ways(data, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """The settings of each way."""
    model = tmp_path_factory.mktemp("siglip")
    write_siglip(model)
    given = {way: {"data_dir": str(data), **more} for way, more in WAYS.items()}
    given["siglip"]["model"] = str(model)
    return given


@pytest.fixture(scope="module")
def in_two(ways, tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the saved states, and the figures of both processes by way."""
    folder = tmp_path_factory.mktemp("two")
    body = IN_TWO.format(ways=json.dumps(ways), folder=str(folder))
    return folder, results(body, seconds=400)


def flat(state: Any, name: str = "") -> dict[str, Any]:
    """The values of a nested state by their path."""
    if isinstance(state, dict):
        inner = [flat(value, f"{name}.{key}") for key, value in state.items()]
        return {key: value for found in inner for key, value in found.items()}
    if isinstance(state, list | tuple):
        return flat(dict(enumerate(state)), name)
    return {name: state}


def assert_same_state(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    one, other = flat(ours), flat(theirs)
    assert one.keys() == other.keys()
    for name, value in one.items():
        if not isinstance(value, torch.Tensor):
            close = isinstance(value, float)
            assert value == (pytest.approx(other[name], **CLOSE) if close else other[name]), name
            continue
        assert value.shape == other[name].shape and value.device.type == "cpu"
        most = max(1e-6, 1e-3 * float(other[name].abs().max()))
        if name.startswith((".model_state_dict", ".trained_state_dict")):
            # A key's bias moves all scores of a query alike: its gradient is 0 but for rounding,
            # of which Adam makes steps
            most = 1e-3 if name.endswith("k_proj.bias") else 1e-5
        torch.testing.assert_close(value, other[name], rtol=0, atol=most, msg=name)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_figures_and_state_as_one_process_in_half_the_memory(way, ways, in_two, tmp_path):
    folder, found = in_two
    alone = figures(ways[way], ALONE, tmp_path / "alone.pt")
    first, second = (one[way] for one in found)
    assert first["told"] == second["told"] == pytest.approx(alone["told"], **CLOSE)
    states = (
        torch.load(path, weights_only=True)
        for path in (folder / f"{way}.pt", tmp_path / "alone.pt")
    )
    assert_same_state(*states)
    for one in (first, second):
        assert one["bytes"] == pytest.approx(alone["bytes"] / 2, rel=0.02)


SHORT = """
    import os
    import torch
    from clipft.core.errors import ClipftError
    from tests.training.step.sharded_runs import Run
    run = Run.of({{"data_dir": {data!r}, "shard_weights": True}}, processes)
    layer = run.setup.loaded.model.clip.text_model.encoder.layers[1]
    passes = []
    def refuse(*seen):
        passes.append(seen)
        if rank == 1 and len(passes) == {passes}:
            raise torch.OutOfMemoryError("CUDA out of memory")
    layer.mlp.register_forward_pre_hook(refuse)
    try:
        {work}
    except ClipftError as error:
        said = [error.exit_code, error.alone, error.message]
        print("RESULT", json.dumps(said), flush=True)
        os._exit(0)
"""


@pytest.mark.parametrize(
    ("work", "passes"),
    [("run.train()", 3), pytest.param("run.validation_loss()", 1, marks=pytest.mark.slow)],
)
def test_memory_that_runs_out_within_a_pass_ends_all(work, passes, data):
    body = SHORT.format(data=str(data), work=work, passes=passes)
    started = time.monotonic()
    told = []
    for process in start_all(body, 2, minutes=5):
        stdout, stderr = process.communicate(timeout=240)
        lines = [line for line in stdout.splitlines() if line.startswith("RESULT")]
        assert lines, stderr
        told.append(json.loads(lines[0].removeprefix("RESULT")))
    assert time.monotonic() - started < 200  # and not only after the timeout
    assert told[0][:2] == [7, True] and "another process of this run ended" in told[0][2]
    assert told[1][:2] == [9, True] and "--shard-weights" in told[1][2]


def test_the_state_of_the_other_adamw_is_refused(data):
    run = Run.of({"data_dir": str(data)}, ALONE)
    state = run.state.state_dict()
    state["optimizer_state_dict"]["state"] = {0: {"state1": torch.zeros(2), "step": 1}}
    with pytest.raises(ModelError, match="the other AdamW"):
        run.state.load_state_dict(state)
