from hypothesis import given, settings
from hypothesis import strategies as st

from clipft.data.order import EpochPlan, Position, derived_seed

sizes = {
    "pairs": st.integers(1, 200),
    "effective": st.integers(2, 64),
    "micro": st.integers(1, 64),
    "seed": st.integers(0, 99),
}


@settings(max_examples=100, deadline=None)
@given(**sizes, epochs=st.integers(1, 3))
def test_each_epoch_has_every_pair_exactly_once(pairs, effective, micro, seed, epochs):
    plan = EpochPlan(pairs, effective, micro, seed)
    seen = [
        place for batch in plan.from_position(Position(), epochs, plan.order) for place in batch
    ]
    assert sorted(seen) == [(epoch, n) for epoch in range(epochs) for n in range(pairs)]


@settings(max_examples=100, deadline=None)
@given(**sizes, data=st.data())
def test_a_resumed_order_is_the_tail_of_the_uninterrupted_one(pairs, effective, micro, seed, data):
    plan = EpochPlan(pairs, effective, micro, seed)
    whole = list(plan.from_position(Position(), 3, plan.order))
    epoch = data.draw(st.integers(0, 2))
    step = data.draw(st.integers(0, plan.steps - 1))
    tail = list(plan.from_position(Position(epoch, step), 3, plan.order))
    done = epoch * sum(map(plan.micro_batches, range(plan.steps)))
    done += sum(map(plan.micro_batches, range(step)))
    assert tail == whole[done:]


@given(**sizes)
def test_no_step_is_a_single_pair_and_none_is_much_too_large(pairs, effective, micro, seed):
    plan = EpochPlan(pairs, effective, micro, seed)
    lengths = [last - first for first, last in plan.bounds]
    assert sum(lengths) == pairs
    assert max(lengths) <= effective + 1
    if pairs > 1:
        assert min(lengths) > 1


@given(**sizes, other=st.integers(1, 64))
def test_the_micro_batch_does_not_shape_the_order(pairs, effective, micro, seed, other):
    def order(size):
        plan = EpochPlan(pairs, effective, size, seed)
        return [place for batch in plan.from_position(Position(), 1, plan.order) for place in batch]

    assert order(micro) == order(other)


def test_epochs_and_seeds_differ():
    orders = {tuple(EpochPlan(50, 8, 4, s).order(e)) for s in (1, 2) for e in (0, 1)}
    assert len(orders) == 4
    assert len({derived_seed(1, 2, 3), derived_seed(3, 2, 1), derived_seed(1, 2)}) == 3
