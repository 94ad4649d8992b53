"""Collectives, errors and rendezvous, tested with real processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from clipft.config.settings import Settings
from clipft.core.errors import DataError, ProcessError, UsageError
from clipft.distributed import rendezvous
from clipft.distributed.collectives import Processes
from clipft.distributed.rank_zero import on_all_ranks, on_rank_zero, rank_zero_first
from clipft.distributed.rendezvous import find_rendezvous, start_processes
from tests import warm
from tests.training.process_helpers import (
    ROOT,
    free_port,
    results,
    start_all,
    torchrun_environment,
)

COLLECTIVES = """
    uneven = torch.arange(2.0 * rank * 3).reshape(-1, 3) + 100 * rank
    empty_here = torch.ones(2, 4) if rank == 1 else torch.empty(0)
    processes.barrier()
    result = {
        "uneven": processes.gather_rows(uneven).tolist(),
        "empty": processes.gather_rows(empty_here).tolist(),
        "nothing": list(processes.gather_rows(torch.empty(0, 4)).shape),
        "numbers": processes.gather_rows(torch.tensor([rank], dtype=torch.int64)).tolist(),
        "scalars": processes.gather_rows(torch.ones(3 - rank)).tolist(),
        "integers": processes.gather_integers([rank, 1 << 62]),
        "any": [processes.any(rank == 1), processes.any(False), processes.any(True)],
        "objects": processes.gather_objects({"rank": rank}),
        "first": processes.broadcast_object(f"from {rank}"),
    }
"""


def test_collectives_over_three_processes():
    found = results(COLLECTIVES, 3)
    assert found[0] == found[1] == found[2]
    ours = found[0]
    rows = [
        (torch.arange(2.0 * rank * 3).reshape(-1, 3) + 100 * rank).tolist() for rank in range(3)
    ]
    assert ours["uneven"] == rows[0] + rows[1] + rows[2]
    assert ours["empty"] == [[1.0] * 4] * 2
    assert ours["nothing"] == [0, 4]
    assert ours["numbers"] == [0, 1, 2]
    assert ours["scalars"] == [1.0] * 6
    assert ours["integers"] == [[0, 1 << 62], [1, 1 << 62], [2, 1 << 62]]
    assert ours["any"] == [True, False, True]
    assert ours["objects"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert ours["first"] == "from 0"


def test_an_error_on_one_rank_is_raised_on_all():
    body = """
    from clipft.core.errors import DataError
    from clipft.distributed.rank_zero import on_all_ranks, on_rank_zero, rank_zero_first
    calls = []
    def fails_on(which):
        calls.append(which)
        if rank == which:
            raise DataError(f"broken on {rank}", "mend it")
        return rank
    result = []
    for run in (lambda: on_all_ranks(processes, lambda: fails_on(1)),
                lambda: on_rank_zero(processes, lambda: fails_on(0)),
                lambda: rank_zero_first(processes, lambda: fails_on(0))):
        try:
            run()
        except DataError as error:
            result.append([error.message, error.hint])
    result.append(len(calls))
    result.append([on_all_ranks(processes, lambda: fails_on(5)),
                   on_rank_zero(processes, lambda: rank), rank_zero_first(processes, lambda: rank)])
"""
    first, second = results(body)
    raised = [["broken on 1", "mend it"], ["broken on 0", "mend it"], ["broken on 0", "mend it"]]
    assert first[:3] == second[:3] == raised
    assert (first[3], second[3]) == (3, 1)  # what the first cannot do the others do not try
    assert (first[4], second[4]) == ([0, 0, 0], [1, 0, 1])


WAITING = """
    import os, time
    print("here", flush=True)
    processes.barrier()  # they have met, so it is not the meeting that fails
    if rank == 1:
        {last}
    processes.{wait}
"""


def lost(last: str, wait: str, minutes: float) -> str:
    started = time.monotonic()
    first, second = start_all(WAITING.format(last=last, wait=wait), 2, minutes)
    _, stderr = first.communicate(timeout=180)
    second.kill()
    second.communicate()
    assert first.returncode == 1 and time.monotonic() - started < 150
    return stderr.splitlines()[-1]


@pytest.mark.parametrize("wait", ["gather_rows(torch.ones(2))", "barrier()", "gather_objects(0)"])
def test_the_others_get_an_error_if_a_process_is_killed(wait):
    said = lost("os.kill(os.getpid(), 9)", wait, minutes=5)
    assert "ProcessError: another process of this run ended" in said


def test_the_others_get_an_error_after_the_timeout_if_a_process_hangs():
    said = lost("time.sleep(300)", "gather_rows(torch.ones(2))", minutes=0.05)
    assert "did not answer within --process-timeout" in said


def test_collectives_of_a_single_process_do_nothing():
    alone = Processes()
    rows = torch.ones(2, requires_grad=True)
    assert alone.gather_rows(rows).tolist() == [1.0, 1.0]
    assert not alone.gather_rows(rows).requires_grad
    assert alone.gather_integers([3, 4]) == [[3, 4]]
    assert (alone.any(True), alone.any(False)) == (True, False)
    assert alone.gather_objects(3) == [3] and alone.broadcast_object(3) == 3
    error = DataError("a", "b")

    def fail() -> None:
        raise error

    for run in (on_all_ranks, on_rank_zero, rank_zero_first):
        assert run(alone, lambda: 5) == 5
        with pytest.raises(DataError) as raised:
            run(alone, fail)
        assert raised.value is error


SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "gpu[03-07,12],login",
    "SLURM_JOB_ID": "4711",
}


def test_the_rendezvous_under_slurm():
    place = find_rendezvous(SLURM)
    assert place
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (5, 8, 1, 4)
    assert (place.address, place.port) == ("gpu03", 24711)
    for listed, node in (("n1", "n1"), ("n1,n2", "n1"), ("a-[1,3]", "a-1"), ("a[001-004]", "a001")):
        assert find_rendezvous({**SLURM, "SLURM_JOB_NODELIST": listed}).address == node


def test_a_batch_script_of_slurm_without_srun_runs_alone():
    assert find_rendezvous({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}) is None
    assert find_rendezvous({}) is None


def test_an_incomplete_environment_is_refused():
    with pytest.raises(UsageError, match="MASTER_ADDR"):
        find_rendezvous({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(UsageError):
        find_rendezvous({"RANK": "first", "WORLD_SIZE": "2"})


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")
@pytest.mark.parametrize("way_out", ["pass", "raise Interrupted('a', 'b')"])
def test_no_thread_of_the_group_outlives_leave(way_out):
    """A thread that does may abort the process while Python shuts down."""
    body = f"""
import os
from pathlib import Path
from clipft.core.errors import Interrupted
from clipft.config.settings import Settings
from clipft.distributed.rendezvous import start_processes
try:
    with start_processes(Settings(device="cpu")) as processes:
        processes.barrier()
        {way_out}
except Interrupted:
    pass
names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
print([name for name in names if name.startswith(("gloo", "pt_"))])
"""
    port = free_port()
    both = [
        warm.Popen(
            [sys.executable, "-c", body],
            env=torchrun_environment(rank, 2, port),
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in (0, 1)
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in both] == ["[]", "[]"]
    assert [process.returncode for process in both] == [0, 0]


@pytest.mark.parametrize(
    ("sharded", "variable", "value"),
    [(False, "TORCH_NCCL_BLOCKING_WAIT", "1"), (True, "TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")],
)
def test_how_nccl_notices_a_lost_process_without_holding_up_fsdp(
    sharded, variable, value, monkeypatch
):
    names = {"TORCH_NCCL_BLOCKING_WAIT", "TORCH_NCCL_ASYNC_ERROR_HANDLING"}
    for name, given in torchrun_environment(0, 2, 1).items():
        monkeypatch.setenv(name, given)
    for name in names:  # set first, so that it is undone
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    taken, backends = [], []

    def meet(backend, **given):
        backends.append(backend)
        raise RuntimeError("nobody came")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", meet)
    monkeypatch.setattr(rendezvous, "meet", lambda *place: (None, None))  # nobody else is there
    settings = Settings(device="cuda", precision="fp32", scenario="full", shard_weights=sharded)
    for expected in (value, "given by the user"):
        with pytest.raises(ProcessError, match="nobody came"), start_processes(settings):
            pass
        assert {name: os.environ[name] for name in names & os.environ.keys()} == {
            variable: expected
        }
        monkeypatch.setenv(variable, "given by the user")
    assert (taken, backends) == ([0, 0], ["cpu:gloo,cuda:nccl"] * 2)
