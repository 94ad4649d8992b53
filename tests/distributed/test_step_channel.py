"""What processes tell each other in a step, with one group for headers and one for devices.

The second gloo group stands for NCCL: who waits in one of the two hears nothing of the other.
"""

import torch
from torch import nn

from clipft.distributed.collectives import Processes
from clipft.distributed.step_channel import ALONE, open_channel
from tests.conftest import write_shard
from tests.training.process_helpers import results

TWO_GROUPS = """
    import torch.distributed as dist
    from torch import nn
    from clipft.distributed import step_channel
    from clipft.distributed.step_channel import DistributedStepChannel, StepAbandonedError
    channel = DistributedStepChannel(processes, 70, devices=dist.new_group(backend="gloo"))
    def refuse():
        raise torch.OutOfMemoryError("CUDA out of memory")
    def gradients(*sizes):
        made = [nn.Parameter(torch.zeros(n)) for n in sizes]
        for p in made:
            p.grad = torch.full_like(p, rank + 1.0)
        return made
"""


def test_rows_and_gradients_of_three_processes():
    body = """
    pairs = (2, 0, 3)[rank]  # the second has none, and knows neither width nor groups
    own = torch.full((pairs, 4), 1.0 + rank, requires_grad=True) if pairs else torch.empty(0)
    ids = torch.arange(pairs) + (rank + 1 << 61) if pairs else None
    plain = channel.exchange(own, own * 10)
    grouped = channel.exchange(own, own * 10, ids)
    products = channel.exchange(own, own * 10, None, ids)
    both = channel.exchange(own, own * 10, ids, None if ids is None else -ids)
    if pairs:
        (plain.images.sum() * 2 + plain.texts[:, 0].sum()).backward()
    a, b, c, d = (nn.Parameter(torch.zeros(2)) for _ in range(4))
    if rank == 1:
        b.grad = torch.full((2,), 5.0)  # None on the others
    a.grad, c.grad = torch.full((2,), rank + 1.0), torch.full((2,), rank + 7.0)
    sums = channel.sum([a, b, c, d], complete=[c], figures=[rank + 0.25, -1e300])
    many = gradients(*[1] * 70)
    channel.sum(many)
    step_channel._BUCKET_BYTES = 100
    uneven = gradients(3, 40, 1, 0, 7, 20)
    uneven.append(nn.Parameter(torch.zeros(4, dtype=torch.float64)))
    uneven[-1].grad = torch.ones(4, dtype=torch.float64)
    uneven[1].grad = torch.full((20, 2), rank + 1.0).T.reshape(40)[::1]
    channel.sum(uneven)
    result = {
        "images": plain.images.tolist(), "texts": plain.texts.tolist(), "none": plain.groups,
        "same": torch.equal(plain.images, grouped.images),
        "groups": grouped.groups.tolist(), "unknown": grouped.products,
        "products": [products.groups, products.products.tolist()],
        "both": [both.groups.tolist(), both.products.tolist()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in (a, b, c, d)],
        "sums": sums, "many": sorted({p.grad.item() for p in many}),
        "uneven": [p.grad.unique().tolist() for p in uneven],
    }
    print("OWN", own.grad.tolist() if pairs else None)
"""
    found = results(TWO_GROUPS + body, 3)
    assert found[0] == found[1] == found[2]
    ours = found[0]
    assert ours["images"] == [[1.0] * 4] * 2 + [[3.0] * 4] * 3
    assert ours["texts"] == [[10.0] * 4] * 2 + [[30.0] * 4] * 3
    assert ours["none"] is None and ours["same"]
    first, third = 1 << 61, 3 << 61
    assert ours["groups"] == [first, first + 1, third, third + 1, third + 2]
    assert ours["unknown"] is None and ours["products"] == [None, ours["groups"]]
    assert ours["both"] == [ours["groups"], [-i for i in ours["groups"]]]
    assert ours["gradients"] == [[6.0, 6.0], [5.0, 5.0], [7.0, 7.0], None]
    assert ours["sums"] == [3.75, -3e300] and ours["many"] == [6.0]
    assert ours["uneven"] == [[6.0], [6.0], [6.0], [], [6.0], [6.0], [3.0]]


def test_all_hear_of_a_process_that_runs_out_of_memory_wherever_it_does():
    """Before each collective, and while its buffers are allocated; then all go on together."""
    body = """
    real = step_channel._flat_buffers
    class Refusing(torch.Tensor):
        def new_zeros(self, *args, **kwargs):
            refuse()
    rows, ids = torch.ones(2, 3), torch.arange(2)
    points = {
        "before exchange": (refuse, lambda: channel.exchange(rows, rows)),
        "in exchange": (lambda: channel.exchange(rows.as_subclass(Refusing), rows),
                        lambda: channel.exchange(rows, rows)),
        "in exchange with groups": (
            lambda: channel.exchange(rows.as_subclass(Refusing), rows, ids),
            lambda: channel.exchange(rows, rows, ids)),
        "before sum": (refuse, lambda: channel.sum(gradients(5))),
        "in sum": (lambda: channel.sum(gradients(5)), lambda: channel.sum(gradients(5))),
    }
    result = []
    for failing in (0, 1):
        for name, (fail, go_on) in points.items():
            step_channel._flat_buffers = (
                (lambda buckets: refuse()) if name == "in sum" and rank == failing else real)
            try:
                (fail if rank == failing else go_on)()
            except StepAbandonedError:
                result.append("heard")
            except torch.OutOfMemoryError:
                channel.abandon()
                result.append("said")
            step_channel._flat_buffers = real
            again = gradients(5)
            assert len(channel.exchange(rows, rows, ids).groups) == 4
            channel.sum(again)
            assert again[0].grad.tolist() == [3.0] * 5
"""
    first, second = results(TWO_GROUPS + body)
    assert first == ["said"] * 5 + ["heard"] * 5
    assert second == ["heard"] * 5 + ["said"] * 5


def test_a_single_process_copies_nothing():
    assert open_channel(Processes(), 5) is ALONE
    rows, groups = torch.ones(2, 3, requires_grad=True), torch.arange(2)
    found = ALONE.exchange(rows, rows, groups)
    assert found.images is rows and found.texts is rows and found.groups is groups
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    assert ALONE.sum([parameter], figures=[0.5]) == [0.5]
    assert parameter.grad.tolist() == [1.0, 1.0]
    ALONE.abandon()


COUNTING = """
    import torch
    import torch.distributed as dist
    from torch.distributed import distributed_c10d
    from clipft.training.loop import fit
    from tests.training.step.sharded_runs import Run
    called, result = [], []
    def counted(name):
        real = getattr(dist, name)
        def call(*args, **kwargs):
            called.append(name)
            return real(*args, **kwargs)
        for owner in (dist, distributed_c10d):  # its own functions call each other there
            setattr(owner, name, call)
    for name in ("all_gather", "all_reduce", "all_gather_into_tensor", "broadcast", "barrier",
                 "all_gather_object", "broadcast_object_list"):
        counted(name)
    for given in {ways!r}:
        run, totals = Run.of({{**{given!r}, **given}}, processes), []
        accumulate = run.setup.make_accumulation(run.state.optimizer, print)
        for step in fit(run.state, run.setup.step_batches(run.state.position), accumulate):
            totals.append(sorted(called))
            called.clear()
        result.append(totals[1:])  # not the first, which also counts the preparation
"""


def test_a_step_takes_five_headers_and_two_moves(tmp_path):
    """One header when all have read their pairs, and two for each of exchange and sum."""
    write_shard(tmp_path / "train" / "00000.tar", range(40))
    write_shard(tmp_path / "val" / "00000.tar", range(1000, 1008))
    given = {"data_dir": str(tmp_path), "max_bad": 0, "epochs": 2}
    ways = [{}, {"positives": "caption"}, {"accumulation": "local"}]
    exact = ["all_gather"] * 5 + ["all_gather_into_tensor", "all_reduce"]
    local = ["all_gather"] * 3 + ["all_reduce"]
    for counted in results(COUNTING.format(given=given, ways=ways)):
        assert counted == [[exact] * 3, [exact] * 3, [local] * 3]
