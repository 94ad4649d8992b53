import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipft.errors import DivergedError
from clipft.training.optimisation import (
    MAX_SKIPPED_STEPS,
    Optimiser,
    one_cycle,
    parameter_groups,
    warmup_steps,
)


def make(total: int, warmup: int, lr: float = 1.0, clip: float = 0.0) -> Optimiser:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([weight], lr=lr)
    scheduler = one_cycle(optimizer, lr, total, warmup)
    return Optimiser(optimizer, scheduler, torch.amp.GradScaler("cpu", enabled=False), clip)


def set_gradient(optimiser: Optimiser, value: float) -> None:
    for parameter in optimiser.optimizer.param_groups[0]["params"]:
        parameter.grad = torch.full_like(parameter, value)


@settings(max_examples=40, deadline=None)
@given(total=st.integers(1, 60), asked=st.integers(0, 100))
def test_any_number_of_steps_has_a_learning_rate(total, asked):
    warmup = warmup_steps(asked, total)
    optimiser, rates = make(total, warmup), []
    for _ in range(total):
        set_gradient(optimiser, 0.1)
        rates.append(optimiser.update().lr)
    assert warmup <= max(0, total // 10)
    assert all(0 < rate <= 1.0 + 1e-9 for rate in rates)
    if warmup:
        assert rates.index(max(rates)) == warmup - 1
        assert max(rates) == pytest.approx(1.0)
    assert rates[-1] > 1e-5  # the last step still learns


def test_norms_biases_and_scale_do_not_decay():
    layer = torch.nn.Linear(3, 3)
    named = [*layer.named_parameters(), ("logit_scale", torch.nn.Parameter(torch.tensor(1.0)))]
    decaying, steady = parameter_groups(named, 0.1)
    assert (decaying["weight_decay"], steady["weight_decay"]) == (0.1, 0.0)
    assert [p.ndim for p in steady["params"]] == [1, 0]


def test_a_gradient_that_is_not_finite_is_not_applied_and_ten_in_a_row_are_too_many():
    optimiser = make(100, 0)
    weight = optimiser.optimizer.param_groups[0]["params"][0]
    for _ in range(MAX_SKIPPED_STEPS - 1):
        set_gradient(optimiser, math.nan)
        assert not optimiser.update().applied
    assert torch.equal(weight, torch.ones(2, 2))
    set_gradient(optimiser, 1.0)
    assert optimiser.update().applied  # counting starts over
    for _ in range(MAX_SKIPPED_STEPS - 1):
        set_gradient(optimiser, math.inf)
        optimiser.update()
    set_gradient(optimiser, math.inf)
    with pytest.raises(DivergedError, match="not finite"):
        optimiser.update()


def test_clipping_reports_the_norm_before_it_and_0_switches_it_off():
    for clip in (1.0, 0.0):
        optimiser = make(10, 0, clip=clip)
        set_gradient(optimiser, 5.0)
        assert optimiser.update().grad_norm == pytest.approx(10.0)


def test_state_goes_on_where_it_was():
    one, other = make(20, 2), make(20, 2)
    for _ in range(5):
        set_gradient(one, 0.3)
        one.update()
    other.load_state_dict(one.state_dict())
    set_gradient(one, 0.3)
    set_gradient(other, 0.3)
    assert one.update() == other.update()
    assert other.optimizer.param_groups[0]["lr"] == one.optimizer.param_groups[0]["lr"]
