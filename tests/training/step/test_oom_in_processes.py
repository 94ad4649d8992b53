"""One of two processes runs out of memory, wherever it can: all go on together, or all end.

A second gloo group stands for NCCL. A process that waits in one of the two groups for a process
that speaks in the other would wait until the timeout, as on GPUs.
"""

import json
import time
from pathlib import Path

import pytest

from tests.conftest import write_shard
from tests.training.process_helpers import results, start_all

PREPARE = """
    import itertools, os
    import torch
    import torch.distributed as dist
    from clipft.core.errors import ClipftError
    from clipft.distributed import step_channel
    from clipft.training.loop import fit
    from clipft.training.state import TrainState
    from clipft.training.step.losses import ContrastiveLoss
    from tests.training.step.sharded_runs import Run

    run = Run.of({given!r}, processes)
    model, setup = run.setup.loaded.model, run.setup
    start = model.trainable_state()
    devices, said = dist.new_group(backend="gloo"), []
    weight = next(p for name, p in model.trainable() if "vision" in name)

    def refuse(*seen):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def nccl_refuses(*seen, **given):
        raise dist.DistBackendError("ncclUnhandledCudaError: Call to CUDA function failed.\\n"
                                    "Last error:\\nFailed to CUDA calloc 6291456 bytes")

    def train(spoil=None):
        "The weights after all steps; on one process ``spoil`` is called before the second one."
        model.load_trainable_state(start)
        run.state = TrainState(model, setup.make_optimizer(), setup.epoch_plan.steps)
        accumulate = setup.make_accumulation(run.state.optimizer, said.append)
        accumulate.channel.devices = devices
        attempts, mended = accumulate.recovery.attempts, []
        def attempts_of(step):
            for number, attempt in enumerate(attempts(step)):
                if spoil and step == 1 and number == 0:
                    mended.append(spoil(accumulate))
                elif mended:
                    mended.pop()()
                yield attempt
        accumulate.recovery.attempts = attempts_of
        batches = run.setup.step_batches(run.state.position)
        losses = [step.loss for step in fit(run.state, batches, accumulate)]
        return losses, model.trainable_state()

    def patching(owner, name, value):
        "Put ``value`` there; what is returned undoes it."
        real = getattr(owner, name)
        setattr(owner, name, value)
        return lambda: setattr(owner, name, real)

    def in_layer(tower):
        named = model.clip.named_modules()
        layer = next(module for name, module in named if tower in name and name.endswith("mlp"))
        return lambda accumulate: layer.register_forward_pre_hook(refuse).remove

    POINTS = {{
        "image forward": in_layer("vision_model"),
        "text forward": in_layer("text_model"),
        "before the exchange": lambda a: patching(a, "_groups", refuse),
        "in the exchange": lambda _: patching(torch.Tensor, "new_empty", refuse),
        "loss": lambda _: patching(ContrastiveLoss, "__call__", refuse),
        "backward": lambda _: weight.register_hook(refuse).remove,
        "in the sum": lambda _: patching(step_channel, "_flat_buffers", refuse),
        "optimizer": lambda _: patching(torch.optim.AdamW, "_init_group", refuse),
        "within the all-gather": lambda _: patching(dist, "all_gather_into_tensor", nccl_refuses),
        "within the all-reduce": lambda _: patching(dist, "all_reduce", nccl_refuses),
    }}
"""
GO_ON = (
    PREPARE
    + """
    undisturbed, expected = train()
    result = {{}}
    for failing, name in itertools.product((0, 1), {points!r}):
        said.clear()
        losses, weights = train(POINTS[name] if rank == failing else lambda a: lambda: None)
        same = [torch.equal(weights[name], tensor) for name, tensor in expected.items()]
        result[f"{{name}} of {{failing}}"] = [losses == undisturbed and all(same), len(said)]
"""
)
END = (
    PREPARE
    + """
    try:
        train(POINTS[{point!r}] if rank == {failing} else None)
    except ClipftError as error:
        print("RESULT", json.dumps([error.exit_code, error.message]), flush=True)
        os._exit(0)
"""
)
REPEATED = ("image forward", "text forward", "in the exchange", "loss", "backward", "in the sum")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_shard(folder / "train" / "00000.tar", range(40))
    write_shard(folder / "val" / "00000.tar", range(1000, 1008))
    return folder


@pytest.mark.parametrize(
    "given",
    [
        {"positives": "caption"},
        pytest.param({"accumulation": "local"}, marks=pytest.mark.slow),
        pytest.param({"scenario": "dual_lora", "lora_dropout": 0.2}, marks=pytest.mark.slow),
    ],
    ids=lambda given: next(iter(given)),
)
def test_all_repeat_the_step_and_the_run_stays_the_same_to_the_bit(given, data):
    local = "accumulation" in given
    points = ["before the exchange", *(p for p in REPEATED if not (local and "exchange" in p))]
    body = GO_ON.format(given={"data_dir": str(data), "epochs": 1, **given}, points=points)
    first, second = results(body, seconds=240)
    expected = {f"{point} of {rank}": [True, 1] for rank in (0, 1) for point in points}
    assert first == second == expected


@pytest.mark.parametrize(
    ("point", "failing", "where"),
    [
        ("optimizer", 1, "when the weights were updated"),
        pytest.param("within the all-gather", 0, "in the exchange between", marks=pytest.mark.slow),
        ("within the all-reduce", 1, "in the exchange between"),
    ],
)
def test_all_end_at_once_where_the_step_cannot_be_repeated(point, failing, where, data):
    given = {"data_dir": str(data), "epochs": 1}
    body, started = END.format(given=given, point=point, failing=failing), time.monotonic()
    told = []
    for process in start_all(body, 2, minutes=5):
        stdout, stderr = process.communicate(timeout=240)
        lines = [line for line in stdout.splitlines() if line.startswith("RESULT")]
        assert lines, stderr
        told.append(json.loads(lines[0].removeprefix("RESULT")))
    assert time.monotonic() - started < 200  # and not only after the timeout
    (code, message), (other_code, other_message) = told[failing], told[1 - failing]
    assert code == 9 and where in message and "\n" not in message
    assert other_code == 7 and "another process of this run ended" in other_message
