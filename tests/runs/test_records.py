"""What a run takes, in hours of devices and in money."""

from dataclasses import replace

import pytest

from clipft.core.files import read_json
from clipft.runs.folder import RunPaths
from clipft.runs.loggers import FileLogger
from clipft.runs.records import Plan, Usage

PLAN = Plan(
    scenario="dual_lora",
    model="tiny",
    parameters="training 8 parameters",
    trainable_parameters=8,
    train_pairs=100,
    val_pairs=10,
    epochs=1,
    steps_per_epoch=4,
    warmup_steps=0,
    effective_batch_size=32,
    micro_batch_size=32,
    device="cuda:0",
    precision="bf16",
    optimizer="adamw",
    processes=8,
)


def test_every_gpu_counts_but_processes_without_one_share_a_machine():
    assert Usage(PLAN, 1800).device_hours == pytest.approx(4.0)
    assert Usage(replace(PLAN, device="cpu"), 1800).device_hours == pytest.approx(0.5)


def test_money_is_named_only_where_a_price_is_given():
    assert Usage(PLAN, 1800).to_dict() == {"device_hours": 4.0}
    assert Usage(PLAN, 1800, 2.5).to_dict() == {"device_hours": 4.0, "cost": 10.0}
    assert str(Usage(PLAN, 1800)) == "4 GPU hours"
    assert str(Usage(PLAN, 1800, 2.5)) == "4 GPU hours, 10.00 at 2.5 an hour"


def test_a_resumed_run_adds_to_what_it_took_before(tmp_path):
    paths = RunPaths(tmp_path)
    logger = FileLogger(paths, {}, lambda: 0, price_per_hour=3.0)
    logger.started(PLAN, 0)
    record = read_json(paths.record)
    paths.record.write_text('{"seconds": 3600.0}')
    logger.started(PLAN, 2)
    resumed = read_json(paths.record)
    assert record["cost"] < 0.1
    assert resumed["device_hours"] == pytest.approx(8.0, abs=0.1)
    assert resumed["cost"] == pytest.approx(24.0, abs=0.3)
