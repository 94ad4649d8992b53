import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipft.config.scenarios import SCENARIOS
from clipft.config.sources import load_settings
from clipft.core.errors import DivergedError, ModelError, UsageError
from clipft.models.pretrained import load_pretrained
from clipft.models.trainable import TrainableModel, adapt
from clipft.training.step import optimizer as step_optimizer
from clipft.training.step.optimizer import (
    MAX_SKIPPED_STEPS,
    Optimizer,
    choose_optimizer,
    eight_bit_fault,
    make_adamw,
    one_cycle,
    parameter_groups,
    warmup_steps,
)

LOSS = torch.tensor(1.0)


def make(total: int, warmup: int, lr: float = 1.0, clip: float = 0.0) -> Optimizer:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    adamw = torch.optim.AdamW([weight], lr=lr)
    scheduler = one_cycle(adamw, total, warmup)
    return Optimizer(adamw, scheduler, torch.amp.GradScaler("cpu", enabled=False), clip)


def set_gradient(optimizer: Optimizer, value: float) -> None:
    for parameter in optimizer.adamw.param_groups[0]["params"]:
        parameter.grad = torch.full_like(parameter, value)


@settings(max_examples=40, deadline=None)
@given(total=st.integers(1, 60), asked=st.integers(0, 100))
def test_any_number_of_steps_has_a_learning_rate(total, asked):
    warmup = warmup_steps(asked, total)
    optimizer, rates = make(total, warmup), []
    for _ in range(total):
        set_gradient(optimizer, 0.1)
        rates.append(optimizer.update(LOSS).lr)
    assert warmup <= max(0, total // 10)
    assert all(0 < rate <= 1.0 + 1e-9 for rate in rates)
    if warmup:
        assert rates.index(max(rates)) == warmup - 1
        assert max(rates) == pytest.approx(1.0)
    assert rates[-1] > 1e-5  # the last step still trains


def tiny(scenario: str, **given: object) -> tuple[TrainableModel, list[dict[str, Any]]]:
    values = load_settings({"scenario": scenario, "lr": "0.01", **given}, environ={}).values
    model = adapt(load_pretrained("tiny"), SCENARIOS[scenario], values)
    return model, parameter_groups(model, values)


def rates(model: TrainableModel, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """(learning rate, decay) by the name of the parameter."""
    by_id = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    found = {name: by_id.pop(id(p)) for name, p in model.trainable()}
    assert not by_id
    return found


@pytest.mark.parametrize("given", [{}, {"layer_decay": "0.5"}, {"lr_scale": "1e-5"}])
@pytest.mark.parametrize("scenario", ["full", "dual_lora", "linear_probe"])
def test_norms_biases_and_scale_do_not_decay(scenario, given):
    model, groups = tiny(scenario, lora_dora=True, logit_scale="trained", **given)
    for name, parameter in model.trainable():
        steady = parameter.ndim < 2
        assert (rates(model, groups)[name][1] == 0.0) == steady, name


def test_by_default_all_weights_have_one_rate():
    for scenario in ("full", "dual_lora"):
        _, groups = tiny(scenario)
        assert all(group["lr"] == 0.01 for group in groups)
        assert len(groups) == (2 if scenario == "full" else 1)


def test_projections_and_scale_can_have_their_own_rates():
    given = {"lr_projections": "0.002", "lr_scale": "0.003", "logit_scale": "trained"}
    model, groups = tiny("dual_lora", **given)
    for name, (rate, _) in rates(model, groups).items():
        projection = "_projection" in name and ".layers." not in name
        assert rate == (0.002 if projection else 0.003 if "logit" in name else 0.01), name
    assert groups[0]["lr"] == 0.01
    assert tiny("linear_probe", **given)[1][0]["lr"] == 0.002


def test_layer_decay_falls_from_the_top_of_each_tower():
    model, groups = tiny("full", layer_decay="0.5", wd="0")
    found = rates(model, groups)
    for tower in ("vision", "text"):
        layers = getattr(model.clip.config, f"{tower}_config").num_hidden_layers
        for layer in range(layers):
            rate, _ = found[f"{tower}_model.encoder.layers.{layer}.mlp.fc1.weight"]
            assert rate == pytest.approx(0.01 * 0.5 ** (layers - layer))
        embedding = f"{tower}_model.embeddings.position_embedding.weight"
        assert found[embedding][0] == pytest.approx(0.01 * 0.5 ** (layers + 1))
    top = ("visual_projection.weight", "text_model.final_layer_norm.bias", "logit_scale")
    assert [found[name][0] for name in top] == [0.01] * 3
    assert groups[0]["lr"] == 0.01


def test_each_group_has_its_own_cycle():
    one, other = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    adamw = torch.optim.AdamW([{"params": [one], "lr": 1.0}, {"params": [other], "lr": 0.1}])
    scheduler = one_cycle(adamw, 20, 2)
    optimizer = Optimizer(adamw, scheduler, torch.amp.GradScaler("cpu", enabled=False), 0.0)
    for _ in range(20):
        one.grad, other.grad = torch.ones(2), torch.ones(2)
        first, second = (group["lr"] for group in adamw.param_groups)
        assert second == pytest.approx(first / 10)
        assert optimizer.update(LOSS).lr == first


def test_a_gradient_that_is_not_finite_is_not_applied_and_ten_in_a_row_end_the_run():
    optimizer = make(100, 0)
    weight = optimizer.adamw.param_groups[0]["params"][0]
    for _ in range(MAX_SKIPPED_STEPS - 1):
        set_gradient(optimizer, math.nan)
        assert not optimizer.update(LOSS).applied
    assert torch.equal(weight, torch.ones(2, 2))
    set_gradient(optimizer, 1.0)
    assert optimizer.update(LOSS).applied  # counting starts over
    for _ in range(MAX_SKIPPED_STEPS - 1):
        set_gradient(optimizer, math.inf)
        optimizer.update(LOSS)
    set_gradient(optimizer, math.inf)
    with pytest.raises(DivergedError, match="not finite"):
        optimizer.update(LOSS)


def test_clipping_reports_the_norm_before_and_0_switches_it_off():
    for clip in (1.0, 0.0):
        optimizer = make(10, 0, clip=clip)
        set_gradient(optimizer, 5.0)
        assert optimizer.update(LOSS).grad_norm == pytest.approx(10.0)


def test_a_restored_optimizer_continues_where_it_was():
    one, other = make(20, 2), make(20, 2)
    for _ in range(5):
        set_gradient(one, 0.3)
        one.update(LOSS)
    other.load_state_dict(one.state_dict())
    set_gradient(one, 0.3)
    set_gradient(other, 0.3)
    assert one.update(LOSS) == other.update(LOSS)
    assert other.adamw.param_groups[0]["lr"] == one.adamw.param_groups[0]["lr"]


def test_the_state_of_other_groups_is_refused():
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    adamw = torch.optim.AdamW([{"params": [weight], "lr": 0.5} for weight in weights])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    two = Optimizer(adamw, one_cycle(adamw, 20, 2), scaler, 0.0)
    with pytest.raises(ModelError, match="does not fit"):
        two.load_state_dict(make(20, 2).state_dict())
    state = make(20, 2, lr=1.0).state_dict()
    state["scheduler_state_dict"]["_last_lr"] = [0.25]
    with pytest.raises(ModelError, match="learning rates"):
        make(20, 2).load_state_dict(state)


CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))
GIB = 1 << 30
FULL = {"B/32": 151_277_313, "L/14": 427_616_513, "bigG/14": 2_539_567_362}


class Choice:
    """``choose_optimizer`` on a card with ``memory`` GiB, where bitsandbytes fails by ``fault``."""

    def __init__(self, monkeypatch, memory: int = 80, fault: str | None = None) -> None:
        self.notes, self.tried = list[str](), list[torch.device]()
        monkeypatch.setattr(step_optimizer, "usable_memory", lambda device: memory * GIB)
        monkeypatch.setattr(
            step_optimizer, "eight_bit_fault", lambda device: self.tried.append(device) or fault
        )

    def __call__(
        self,
        asked: str = "auto",
        trainable: int = FULL["L/14"],
        device: torch.device = CUDA,
        sharded: bool = False,
        began: str = "",
    ) -> str:
        values = load_settings({"optimizer": asked}, environ={}).values
        return choose_optimizer(values, device, trainable, sharded, began, self.notes.append)


@pytest.mark.parametrize(
    ("model", "memory", "chosen"),
    [
        ("B/32", 80, "adamw"),
        ("B/32", 8, "adamw"),
        ("B/32", 6, "adamw8bit"),
        ("L/14", 80, "adamw"),
        ("L/14", 24, "adamw"),
        ("L/14", 16, "adamw8bit"),
        ("bigG/14", 80, "adamw8bit"),
        ("bigG/14", 141, "adamw"),
    ],
)
def test_auto_takes_8_bits_only_where_memory_needs_them(model, memory, chosen, monkeypatch):
    choose = Choice(monkeypatch, memory)
    assert choose(trainable=FULL[model]) == chosen
    assert choose.tried == ([CUDA] if chosen == "adamw8bit" else []) and not choose.notes
    assert choose(trainable=FULL[model], device=CPU) == "adamw"
    assert choose(trainable=FULL[model], device=MPS) == "adamw"
    assert choose(trainable=FULL[model], sharded=True) == "adamw"


def test_auto_falls_back_with_a_note_if_8_bits_do_not_run(monkeypatch):
    choose = Choice(monkeypatch, 8, "RuntimeError: no CUDA binary")
    assert choose() == "adamw"
    assert choose.notes == [
        "note: AdamW with 8-bit states does not run here (RuntimeError: no CUDA binary): using 32 "
        "bits."
    ]


def test_8_bits_that_were_asked_for_and_do_not_run_are_an_error(monkeypatch):
    with pytest.raises(UsageError, match="--optimizer adamw8bit does not run here: no binary"):
        Choice(monkeypatch, fault="no binary")("adamw8bit")
    assert Choice(monkeypatch)("adamw8bit", device=CPU) == "adamw8bit"
    choose = Choice(monkeypatch, 1)
    assert choose("adamw") == "adamw" and not choose.notes and not choose.tried


def test_a_resumed_run_keeps_its_optimizer_on_other_hardware(monkeypatch):
    small = Choice(monkeypatch, 8)
    assert small(began="adamw") == "adamw"
    assert len(small.notes) == 1 and "continues with it" in small.notes[0]
    large = Choice(monkeypatch, 80)
    assert large(began="adamw8bit") == "adamw8bit" and large.tried == [CUDA]
    assert large(began="adamw8bit", device=CPU) == "adamw8bit"
    assert large(began="adamw") == "adamw" and not large.notes
    with pytest.raises(UsageError, match="adamw8bit that this run began with does not run here"):
        Choice(monkeypatch, fault="no binary")(began="adamw8bit")
    with pytest.raises(UsageError, match="sharding would cut its states"):
        Choice(monkeypatch)(began="adamw8bit", sharded=True)


def broken_bitsandbytes(step) -> SimpleNamespace:
    class AdamW8bit(torch.optim.SGD):
        def __init__(self, groups) -> None:
            super().__init__(groups, lr=1.0)

        def step(self, closure=None):
            return step(self)

    return SimpleNamespace(AdamW8bit=AdamW8bit)


def test_the_trial_finds_a_library_that_is_missing_or_broken_or_does_nothing(monkeypatch):
    def refuse(optimizer) -> None:
        raise NameError("name 'str2optimizer8bit_blockwise' is not defined\nand a long report")

    for module, said in (
        (None, "ModuleNotFoundError: "),
        (broken_bitsandbytes(refuse), "NameError: name 'str2optimizer8bit_blockwise' is not"),
        (broken_bitsandbytes(lambda optimizer: None), "its step changes no weight"),
    ):
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
        fault = eight_bit_fault(CPU)
        assert fault and said in fault and "\n" not in fault
    working = broken_bitsandbytes(lambda optimizer: torch.optim.SGD.step(optimizer))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", working)
    assert eight_bit_fault(CPU) is None


@pytest.mark.parametrize(("device", "fused"), [(CPU, True), (CUDA, True), (MPS, False)])
def test_the_fused_adamw_is_asked_for_only_where_it_exists(device, fused, monkeypatch):
    given = {}
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **options: given.update(options))
    make_adamw("adamw", [], device)
    assert given == {"fused": fused}


def in_precision(name: str) -> Optimizer:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    adamw = torch.optim.AdamW([weight], lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=name == "fp16")
    return Optimizer(adamw, one_cycle(adamw, 20, 2), scaler, 0.0)


PRECISIONS = ("fp32", "bf16", "fp16")


@pytest.mark.parametrize("there", PRECISIONS)
@pytest.mark.parametrize("here", PRECISIONS)
def test_a_state_of_any_precision_goes_on_in_any_other(there, here):
    one, other = in_precision(there), in_precision(here)
    one.scaler.scale(torch.ones(1))
    set_gradient(one, 4.0)
    one.update(LOSS)
    if there == "fp16":
        one.scaler.update(new_scale=2.0)
    other.load_state_dict(one.state_dict())
    expected = 1.0 if here != "fp16" else 2.0 if there == "fp16" else 8.0  # 8: a new scaler's
    assert other.scaler.get_scale() == expected
    moments = [next(iter(o.adamw.state.values()))["exp_avg"] for o in (one, other)]
    assert torch.equal(*moments)
    scaled = other.scaler.scale(torch.ones(1)).item()
    set_gradient(other, 3.0 * scaled)
    update = other.update(LOSS)
    assert update.applied and update.grad_norm == pytest.approx(6.0)


def test_a_scaler_asks_the_device_no_more_often_than_torch_does(monkeypatch):
    """Each ``item`` waits for the device: one for the norm, and torch's own look for infinities."""
    asked = list[str]()
    item, to_float = torch.Tensor.item, torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "item", lambda t: asked.append("item") or item(t))
    monkeypatch.setattr(torch.Tensor, "__float__", lambda t: asked.append("f") or to_float(t))

    def count(step) -> int:
        asked.clear()
        step()
        return len(asked)

    ours, theirs = in_precision("fp16"), in_precision("fp16")
    for optimizer in (ours, theirs):
        optimizer.scaler.scale(torch.ones(1))
        set_gradient(optimizer, 8.0)

    def plain() -> None:
        theirs.scaler.unscale_(theirs.adamw)
        theirs.scaler.step(theirs.adamw)
        theirs.scaler.update()

    assert count(lambda: ours.update(LOSS)) <= count(plain) + 1
