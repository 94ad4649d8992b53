from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from clipft.data.order import EpochPlan, Position, Share, derived_seed

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


def lengths_of(plan: EpochPlan) -> list[int]:
    return [last - first for first, last in plan.bounds]


@given(**sizes)
def test_no_step_has_few_pairs_and_none_is_much_too_large(pairs, effective, micro, seed):
    lengths = lengths_of(EpochPlan(pairs, effective, micro, seed))
    assert sum(lengths) == pairs
    assert all(length == effective for length in lengths[:-1])
    assert lengths[-1] < 1.25 * effective or lengths[-1] == effective + 1
    if pairs >= effective:
        assert lengths[-1] >= max(2, effective / 4)


@given(**sizes)
def test_a_resumed_plan_keeps_the_rule_that_it_began_with(pairs, effective, micro, seed):
    """Before, only a single pair was too small for a step: ``smallest`` 2."""
    lengths = lengths_of(EpochPlan(pairs, effective, micro, seed, smallest=2))
    whole, left = divmod(pairs, effective)
    if left == 1 and whole:
        assert lengths == [*[effective] * (whole - 1), effective + 1]
    else:
        assert lengths == [*[effective] * whole, *([left] if left else [])]
    began = EpochPlan(pairs, effective, micro, seed)
    again = EpochPlan(pairs, effective, micro, seed, began.smallest_step)
    assert again.bounds == began.bounds


@given(**sizes, processes=st.integers(1, 5))
def test_the_shares_of_all_processes_make_up_each_step(pairs, effective, micro, seed, processes):
    plan = EpochPlan(pairs, effective, micro, seed)
    shares = [
        list(plan.from_position(Position(), 1, plan.order, Share(rank, processes)))
        for rank in range(processes)
    ]
    counts = [
        [len(Share(r, processes).of(plan.micro_batches(s))) for s in range(plan.steps)]
        for r in range(processes)
    ]
    assert [sum(count) for count in counts] == [len(share) for share in shares]
    together = [[] for _ in range(plan.steps)]
    for share, of_steps in zip(shares, counts, strict=True):
        batches = iter(share)
        for step, count in enumerate(of_steps):
            together[step] += [place for _ in range(count) for place in next(batches)]
    assert list(map(len, together)) == lengths_of(plan)


def test_1026_pairs_at_1024_are_one_step():
    assert lengths_of(EpochPlan(1026, 1024, 64, 1)) == [1026]
    assert lengths_of(EpochPlan(1024 + 255, 1024, 64, 1)) == [1279]
    assert lengths_of(EpochPlan(1024 + 256, 1024, 64, 1)) == [1024, 256]


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


@settings(max_examples=100, deadline=None)
@given(**sizes, kinds=st.integers(1, 80), epoch=st.integers(0, 2), data=st.data())
def test_photos_of_a_product_meet_in_a_step(pairs, effective, micro, seed, kinds, epoch, data):
    products = np.random.default_rng(seed).integers(-kinds, kinds, pairs)
    plan = EpochPlan(pairs, effective, micro, seed, products=products)
    order = list(plan.order(epoch))
    assert sorted(order) == list(range(pairs)) and order == list(plan.order(epoch))
    first = data.draw(st.integers(0, pairs))
    assert list(plan.order(epoch, first)) == order[first:]
    several = Counter(products.tolist())
    for start, end in plan.bounds:
        held = Counter(products[order[start:end]].tolist())
        lonely = sum(count == 1 and several[product] > 1 for product, count in held.items())
        # At most a photo at each end of a step, where no block of photos fits into what is left
        assert lonely <= 2


def test_with_single_photos_to_fill_up_no_photo_is_without_its_partner():
    products = np.array([*range(20), *range(20), *range(100, 140)])
    plan = EpochPlan(80, 7, 7, seed=3, products=products)
    for epoch in range(3):
        order = list(plan.order(epoch))
        for start, end in plan.bounds[:-3]:
            held = Counter(products[order[start:end]].tolist())
            assert all(held[product] == 2 for product in held if product < 100)


def test_single_photos_and_pairs_of_photos_are_spread_evenly():
    products = np.array([*range(300), *range(300), *range(1000, 1600)])
    plan = EpochPlan(1200, 100, 50, seed=1, products=products)
    order = np.array(list(plan.order(0)))
    singles = [int((products[order[a:b]] >= 1000).sum()) for a, b in plan.bounds]
    assert min(singles) > 30 and max(singles) < 70
    assert list(plan.order(1)) != order.tolist()
    assert list(EpochPlan(1200, 100, 50, 2, products=products).order(0)) != order.tolist()


def drawn_look_alikes(pairs: int, seed: int) -> np.ndarray:
    """Up to five other pairs for each, some of them missing."""
    random = np.random.default_rng(seed)
    found = random.integers(0, pairs, (pairs, 5))
    found[(found == np.arange(pairs)[:, None]) | (random.random((pairs, 5)) < 0.2)] = -1
    return found


@settings(max_examples=100, deadline=None)
@given(**sizes, most=st.integers(1, 4), photos=st.booleans())
def test_an_epoch_with_look_alikes_has_every_pair_once(pairs, effective, micro, seed, most, photos):
    plan = EpochPlan(
        pairs,
        effective,
        micro,
        seed,
        products=np.arange(pairs) // 3 if photos else None,
        look_alikes=drawn_look_alikes(pairs, seed),
        hard_negatives=most,
    )
    order = list(plan.order(1))
    assert sorted(order) == list(range(pairs))
    assert list(plan.order(1, pairs // 2)) == order[pairs // 2 :]


def test_look_alikes_are_in_the_same_step_and_others_are_as_before():
    """Ten families of six look-alikes each; a step of twelve holds two families."""
    family = np.arange(60) // 6
    near = np.array(
        [[m for m in range(60) if family[m] == family[n] and m != n] for n in range(60)]
    )
    plan = EpochPlan(60, 12, 4, seed=3, look_alikes=near, hard_negatives=5)
    orders = [list(plan.order(epoch)) for epoch in range(2)]
    for order in orders:
        held = [Counter(family[order[start:end]].tolist()) for start, end in plan.bounds]
        assert all(set(counts.values()) == {6} for counts in held)
    assert orders[0] != orders[1]


@settings(max_examples=50, deadline=None)
@given(**sizes, most=st.integers(1, 4))
def test_the_order_follows_from_seed_epoch_and_look_alikes(pairs, effective, micro, seed, most):
    def order(epoch: int, table: int, micro: int = micro) -> list[int]:
        near = drawn_look_alikes(pairs, table)
        plan = EpochPlan(pairs, effective, micro, seed, look_alikes=near, hard_negatives=most)
        return list(plan.order(epoch))

    assert order(3, table=1) == order(3, table=1) == order(3, table=1, micro=1)


def test_other_look_alikes_seeds_and_epochs_make_other_orders():
    def order(seed: int, epoch: int, table: int) -> tuple[int, ...]:
        near = drawn_look_alikes(60, table)
        plan = EpochPlan(60, 12, 4, seed, look_alikes=near, hard_negatives=3)
        return tuple(plan.order(epoch))

    assert len({order(s, e, t) for s in (1, 2) for e in (0, 1) for t in (1, 2)}) == 8


def test_with_the_same_look_alikes_an_image_has_other_company_in_other_epochs():
    """Families of twelve; an image takes the two nearest of its family that are left."""
    family = np.arange(120) // 12
    near = np.array(
        [[m for m in range(120) if family[m] == family[n] and m != n][:9] for n in range(120)]
    )
    plan = EpochPlan(120, 6, 3, seed=3, look_alikes=near, hard_negatives=2)
    company = []
    for epoch in range(2):
        order = list(plan.order(epoch))
        steps = [frozenset(order[start:end]) for start, end in plan.bounds]
        company.append({number: step for step in steps for number in step})
    assert sum(company[0][n] != company[1][n] for n in range(120)) > 100
