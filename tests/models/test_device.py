"""The precision of a run, where it begins and where it is resumed."""

import pytest
import torch

from clipft.config.sources import load_settings
from clipft.core.errors import UsageError
from clipft.embedding.load import load_model
from clipft.models import device as devices
from clipft.models.device import NARROW, choose_precision

# What the hardware has instructions for, and what `auto` chooses there
MACHINES = {
    "an A100": ("cuda", True, "bf16"),
    "a V100": ("cuda", False, "fp16"),
    "a CPU with bf16": ("cpu", True, "bf16"),
    "a CPU without": ("cpu", False, "fp32"),
    "a Mac": ("mps", False, "fp32"),
}
WIDE = 768  # a ViT-B's


def use(machine: str, monkeypatch: pytest.MonkeyPatch) -> str:
    kind, native, auto = MACHINES[machine]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: kind == "cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: kind == "mps")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: native, raising=False)
    return auto


def settings(precision: str = "auto"):
    return load_settings({"precision": precision}, environ={}).values


@pytest.mark.parametrize("machine", MACHINES)
def test_auto_chooses_what_the_hardware_computes_in(machine, monkeypatch):
    auto, notes = use(machine, monkeypatch), []
    assert choose_precision(settings(), WIDE, "", notes.append).name == auto and not notes
    narrow = choose_precision(settings(), NARROW - 1, "", notes.append).name
    assert narrow == (auto if "CPU" not in machine else "fp32") and not notes


@pytest.mark.parametrize("began", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("machine", MACHINES)
def test_a_resumed_run_keeps_its_precision_or_says_that_it_cannot(machine, began, monkeypatch):
    auto, notes = use(machine, monkeypatch), []
    kind, native, _ = MACHINES[machine]
    has = {"fp32": True, "bf16": native, "fp16": kind != "cpu"}[began]
    kept = choose_precision(settings(), WIDE, began, notes.append)
    assert (kept.name, kept.device.type) == (began if has else auto, kind)
    if began == auto:
        assert not notes
    elif has:
        assert notes == [
            f"note: this run began with {began} and continues with it; a new run would use {auto} "
            f"on this {kind}."
        ]
    else:
        assert len(notes) == 1 and notes[0].startswith(
            f"warning: this run began with {began}, which"
        )
        assert f"It continues with {auto}" in notes[0]


def test_a_narrow_model_that_began_in_bf16_keeps_it(monkeypatch):
    use("a CPU with bf16", monkeypatch)
    notes = []
    assert choose_precision(settings(), NARROW - 1, "bf16", notes.append).name == "bf16"
    assert "a new run would use fp32" in notes[0]


def test_a_precision_that_was_asked_for_is_never_replaced(monkeypatch):
    use("a CPU without", monkeypatch)
    assert choose_precision(settings("bf16"), 1, "fp32").name == "bf16"
    with pytest.raises(UsageError, match="fp16 needs a GPU"):
        choose_precision(settings("fp16"), WIDE, "fp16")


def test_the_instruction_set_names_generation_or_threads(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert devices.instruction_set(torch.device("cuda")) == "cuda sm_90"
    assert str(torch.get_num_threads()) in devices.instruction_set(torch.device("cpu"))


OPERATIONS = [
    *(("cuda", "matmul"), ("cudnn", "conv"), ("cudnn", "rnn")),
    *(("mkldnn", "matmul"), ("mkldnn", "conv")),
]


def in_force() -> set[str]:
    operations = [getattr(getattr(torch.backends, b), name) for b, name in OPERATIONS]
    return {operation.fp32_precision for operation in operations}


@pytest.fixture
def kept_flags():
    yield
    devices.compute_fp32_exactly()


@pytest.mark.parametrize("way", ["torch's own", "older", "newer", "both"])
def test_a_loaded_model_computes_fp32_in_fp32(way, kept_flags):
    if way in {"older", "both"}:
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.allow_tf32 = True
    if way in {"newer", "both"}:
        torch.backends.fp32_precision = "tf32"
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = (
            "tf32"
        )
    if way == "torch's own":
        torch.backends.fp32_precision = "none"
        torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert in_force() != {"ieee"}
    load_model(load_settings({"model": "tiny", "device": "cpu"}, environ={}).values)
    assert in_force() == {"ieee"}
    # The older forms can still be read, as libraries do
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
