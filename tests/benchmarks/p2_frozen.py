"""P2: frozen towers, whose features clipft caches instead of computing them again.

Trains the real ViT-B/32 with random weights, fp32 on the CPU, without augmentation, for 10 epochs,
and measures from loading the model to the last step, including the computation of the features.
The peers are the same run without the feature cache, and transformers' Trainer with the same
trainable weights (with PEFT for the LoRA scenarios) and captions padded to 77. The feature cache is
empty before each run. Loading takes some seconds for any number of pairs, so more pairs make the
ratios larger.

    python tests/benchmarks/p2_frozen.py --photos DIR [--quick] [--json FILE]

DIR holds NAME.jpg and NAME.txt. The weights after all epochs with and without the cache are
compared as well: the largest difference is printed, and a difference above 1e-5 is an error.
"""

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from p1_training import Place, Samples, Size, make_model, setup_of
from peers import CPU, stacked
from peft import LoraConfig, get_peft_model
from side_by_side import Row, Work, arguments, in_turn, publish, ratio_of
from transformers import CLIPModel, Trainer, TrainingArguments

from clipft.data.loader import training_batches
from clipft.data.order import Position
from clipft.data.packing.options import PackOptions
from clipft.data.packing.pack import pack
from clipft.training.loop import fit
from clipft.training.state import TrainState

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Job:
    """A comparison with the Trainer if ``trainer``, else with the same run without the cache."""

    scenario: str
    trainer: bool
    size: Size
    goal: float


JOBS = (
    Job("linear_probe", False, Size(192, 64, 32), 8),
    Job("linear_probe", True, Size(64, 32, 16), 8),
    Job("vision_lora", True, Size(64, 32, 16), 1.6),
    Job("text_lora", True, Size(32, 32, 16), 1.5),
)
QUICK, EPOCHS = Size(16, 8, 8), 10


def ours(place: Place, size: Size, scenario: str, cached: bool, kept: dict[bool, Weights]) -> Work:
    def work() -> int:
        with tempfile.TemporaryDirectory() as cache:
            os.environ["CLIPFT_CACHE"] = cache
            setup = setup_of(
                place,
                size,
                scenario=scenario,
                augmentation="none",
                feature_cache=cached,
                lora_dropout=0,
                epochs=EPOCHS,
            )
            model = setup.loaded.model
            state = TrainState(model, setup.make_optimizer(), setup.epoch_plan.steps)
            batches = training_batches(
                setup.train,
                setup.encoding.preprocessing,
                setup.epoch_plan,
                Position(),
                EPOCHS,
                setup.loader_options,
            )
            steps = fit(state, batches, setup.make_accumulation(state.optimizer, print))
            pairs = sum(result.pairs for result in steps)
            kept[cached] = model.trainable_state()
        return pairs

    return work


def learning(place: Place, scenario: str) -> Any:
    clip = CLIPModel.from_pretrained(place.model)
    clip.requires_grad_(False)
    if scenario == "linear_probe":
        clip.visual_projection.requires_grad_(True)
        clip.text_projection.requires_grad_(True)
        return clip
    tower = scenario.removesuffix("_lora")
    projection = "visual_projection" if tower == "vision" else "text_projection"
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=rf".*{tower}_model.*\.(q_proj|v_proj)",
        modules_to_save=[projection],
    )
    return get_peft_model(clip, config)


class Plain(Samples):
    """Samples without augmentation."""

    def __init__(self, place: Place, pairs: int) -> None:
        super().__init__(place, pairs)
        self.augment = lambda image: image


def transformers_way(place: Place, size: Size, scenario: str) -> Work:
    def work() -> int:
        with tempfile.TemporaryDirectory() as out:
            how = TrainingArguments(
                output_dir=out,
                per_device_train_batch_size=size.micro,
                gradient_accumulation_steps=size.effective // size.micro,
                max_steps=EPOCHS * (size.pairs // size.effective),
                learning_rate=1e-4,
                **CPU.trainer_arguments(),
            )
            data, model = Plain(place, size.pairs), learning(place, scenario)
            Trainer(model=model, args=how, train_dataset=data, data_collator=stacked).train()
        return EPOCHS * size.pairs

    return work


def measured(place: Place, jobs: tuple[Job, ...], rounds: int) -> list[Row]:
    rows = []
    for job in jobs:
        kept: dict[bool, Weights] = {}
        cached = ours(place, job.size, job.scenario, True, kept)
        if job.trainer:
            name, peer = "transformers' Trainer", transformers_way(place, job.size, job.scenario)
        else:
            name, peer = "without cache", ours(place, job.size, job.scenario, False, kept)
        rows.append(ratio_of(f"{job.scenario}, {name}", *in_turn((cached, peer), rounds), job.goal))
        print(rows[-1], flush=True)
        if not job.trainer:
            check_same(kept)
    return rows


def check_same(kept: dict[bool, Weights]) -> None:
    difference = max((kept[True][n] - w).abs().max().item() for n, w in kept[False].items())
    print(f"weights differ by at most {difference:.1e} after {EPOCHS} epochs", flush=True)
    assert difference < 1e-5, "the cache changes what is learned"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="folder of .jpg with .txt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scenario", default="", help="only the rows of this scenario")
    chosen = parser.parse_args()
    jobs = tuple(job for job in JOBS if chosen.scenario in ("", job.scenario))
    rounds = chosen.rounds
    if chosen.quick:
        jobs, rounds = tuple(replace(job, size=QUICK) for job in jobs), 1
    with tempfile.TemporaryDirectory() as made:
        place = Place(Path(made) / "model", Path(made) / "data")
        make_model(place.model)
        pack(chosen.photos, place.data, PackOptions(), lambda done, total: None)
        rows = measured(place, jobs, rounds)
    publish("P2", rows, ("torch", "transformers", "peft"), chosen.json)


if __name__ == "__main__":
    main()
