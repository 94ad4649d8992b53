"""P1: training throughput on the real ViT-B/32 (random weights: speed does not depend on them).

dual_lora with r = 16, fp32 on the CPU, an effective batch of 128 as 4 micro-batches of 32, from
shards to the optimizer step. clipft computes the exact loss over 128 pairs. The peers are (a)
transformers' Trainer with PEFT, with captions padded to 77 and a loss for each of the four
micro-batches; (b) sentence-transformers' cached loss with PEFT; (c) open_clip's own
``train_one_epoch`` with ``accum_freq`` 4 over the same model with adapters. No side uses worker
processes.

    python tests/benchmarks/p1_training.py --photos DIR [--effective N] [--quick] [--json FILE]

DIR holds NAME.jpg and NAME.txt. ``--profile`` shows where clipft spends its time, and the speed of
plain matrix products in the same run.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import webdataset
from peers import CPU, Machine, adapted, adapted_transformer, stacked, train_with_cached_loss
from side_by_side import Row, Work, arguments, compare, publish
from torch import nn
from torchvision.transforms import v2
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, Trainer, TrainingArguments

from clipft.config.sources import load_settings
from clipft.data.loader import training_batches
from clipft.data.order import Position
from clipft.data.packing.options import PackOptions
from clipft.data.packing.pack import pack
from clipft.distributed.collectives import ALONE
from clipft.training.loop import fit
from clipft.training.prepare import prepare
from clipft.training.setup import RunSetup
from clipft.training.state import TrainState

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.models.checkpoints import clip_tokenizer

LENGTH = 77


@dataclass(frozen=True)
class Size:
    """An optimizer step uses ``effective`` pairs, ``micro`` at a time."""

    pairs: int
    effective: int
    micro: int


QUICK = Size(16, 16, 4)


@dataclass(frozen=True)
class Place:
    """``model`` is the folder of transformers' random ViT-B/32, ``data`` that of the shards."""

    model: Path
    data: Path
    machine: Machine = CPU


def make_model(folder: Path, config: CLIPConfig | None = None) -> None:
    """Write a model with random weights; ViT-B/32 by default."""
    torch.manual_seed(0)
    CLIPModel(config or CLIPConfig()).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)


def setup_of(place: Place, size: Size, **given: Any) -> RunSetup:
    flags = {
        "model": str(place.model),
        "scenario": "dual_lora",
        "data_dir": str(place.data),
        "effective_batch_size": size.effective,
        "micro_batch_size": size.micro,
        "max_train_pairs": size.pairs,
        "max_val_pairs": 8,
        "num_workers": place.machine.workers,
        "precision": "fp32" if place.machine.device == "cpu" else "bf16",
        "device": place.machine.device,
        "epochs": 1000,  # each round trains one epoch
        **given,
    }
    return prepare(load_settings(flags, environ={}).values, lambda note: None, ALONE)


def ours(place: Place, size: Size, **given: Any) -> Work:
    setup = setup_of(place, size, **given)
    state = TrainState(setup.loaded.model, setup.make_optimizer(), setup.epoch_plan.steps)
    accumulate = setup.make_accumulation(state.optimizer, print)
    how, plan = setup.encoding.preprocessing, setup.epoch_plan

    def work() -> int:
        batches = training_batches(setup.train, how, plan, Position(), 1, setup.loader_options)
        return sum(result.pairs for result in fit(state, batches, accumulate))

    return work


def adapted_clip(place: Place) -> Any:
    return adapted(CLIPModel.from_pretrained(place.model))


class Samples(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """Prepares pairs as in transformers' CLIP example: crop, flip, processor, padded captions."""

    def __init__(self, place: Place, pairs: int) -> None:
        self.shards = [str(path) for path in sorted((place.data / "train").glob("*.tar"))]
        self.pairs = pairs
        self.tokenizer, self.processor = clip_tokenizer(), CLIPImageProcessor()
        side = self.processor.size["shortest_edge"]
        self.augment = v2.Compose(
            [v2.RandomResizedCrop(side, scale=(0.8, 1.0)), v2.RandomHorizontalFlip()]
        )

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        stream = webdataset.WebDataset(self.shards, shardshuffle=False).shuffle(1000)
        for image, text in stream.decode("pilrgb").to_tuple("jpg", "txt").slice(self.pairs):
            pixels = self.processor(images=self.augment(image), return_tensors="pt")
            ids = self.tokenizer(
                text, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
            )
            yield {
                "pixel_values": pixels["pixel_values"][0],
                "input_ids": ids["input_ids"][0],
                "attention_mask": ids["attention_mask"][0],
            }


def transformers_way(place: Place, size: Size) -> Work:
    model = adapted_clip(place)

    def work() -> int:
        with tempfile.TemporaryDirectory() as out:
            how = TrainingArguments(
                output_dir=out,
                per_device_train_batch_size=size.micro,
                gradient_accumulation_steps=size.effective // size.micro,
                max_steps=size.pairs // size.effective,
                **place.machine.trainer_arguments(),
            )
            data = Samples(place, size.pairs)
            Trainer(model=model, args=how, train_dataset=data, data_collator=stacked).train()
        return size.pairs

    return work


def sentence_transformers_way(place: Place, size: Size) -> Work:
    module = adapted_transformer(place.model)
    shards = [str(path) for path in sorted((place.data / "train").glob("*.tar"))]
    stored = webdataset.WebDataset(shards, shardshuffle=False).to_tuple("jpg", "txt")
    pairs = list(stored.slice(size.pairs))
    images = [{"bytes": image, "path": None} for image, _ in pairs]
    texts = [text.decode() for _, text in pairs]

    def work() -> int:
        with tempfile.TemporaryDirectory() as out:
            how = {
                "output_dir": out,
                "per_device_train_batch_size": size.effective,
                "max_steps": size.pairs // size.effective,
            }
            train_with_cached_loss(module, images, texts, size.micro, how, place.machine)
        return size.pairs

    return work


class AsOpenClip(nn.Module):
    """The model with adapters, with the outputs that open_clip's loop and loss expect."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    @property
    def logit_scale(self) -> Any:
        return self.clip.logit_scale

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.clip(pixel_values=images, input_ids=texts)
        return {
            "image_features": out.image_embeds,
            "text_features": out.text_embeds,
            "logit_scale": self.clip.logit_scale.exp(),
        }


def open_clip_way(place: Place, size: Size) -> Work:
    from open_clip import ClipLoss, SimpleTokenizer, image_transform
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from open_clip_train.train import train_one_epoch

    device = place.machine.device
    model = AsOpenClip(adapted_clip(place)).to(device)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4)
    transform = image_transform(
        224, is_train=True, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD
    )
    tokenize = SimpleTokenizer(context_length=LENGTH)
    shards = [str(path) for path in sorted((place.data / "train").glob("*.tar"))]
    args = argparse.Namespace(
        device=device,
        precision="fp32" if device == "cpu" else "amp_bf16",
        distill=False,
        accum_freq=size.effective // size.micro,
        skip_scheduler=True,
        horovod=False,
        grad_clip_norm=1.0,
        log_every_n_steps=100,
        world_size=1,
        rank=0,
        local_rank=0,
        log_local=False,
        batch_size=size.micro,
        wandb=False,
    )

    class Data:
        num_batches, num_samples = size.pairs // size.micro, size.pairs

        @property
        def dataloader(self) -> "Data":
            return self

        def set_epoch(self, epoch: int) -> None:
            return

        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            stream = webdataset.WebDataset(shards, shardshuffle=False).decode("pilrgb")
            named = stream.rename(image="jpg", text="txt").repeat()
            ready = named.map_dict(image=transform, text=_first_of(tokenize))
            batched = ready.to_tuple("image", "text").batched(size.micro)
            workers = place.machine.workers
            loader = torch.utils.data.DataLoader(batched, batch_size=None, num_workers=workers)
            return islice(iter(loader), self.num_batches)

    def work() -> int:
        train_one_epoch(model, {"train": Data()}, ClipLoss(), 0, optimizer, None, None, None, args)
        return size.pairs

    return work


def _first_of(tokenize: Callable[[str], torch.Tensor]) -> Callable[[str], torch.Tensor]:
    return lambda text: tokenize(text)[0]


Peer = Callable[[Place, Size], Work]

FIGURES: tuple[tuple[str, Peer, dict[str, Any], float], ...] = (
    ("exact, transformers' Trainer (loss of a micro-batch)", transformers_way, {}, 1.3),
    ("local, transformers' Trainer", transformers_way, {"accumulation": "local"}, 1.6),
    ("exact, sentence-transformers' cached loss", sentence_transformers_way, {}, 1.6),
    ("exact, open_clip's loop, accum_freq 4", open_clip_way, {}, 1.6),
    (
        "exact, no graph kept; sentence-transformers'",
        sentence_transformers_way,
        {"graph_memory": 0},
        1.5,
    ),
)


def measured(place: Place, size: Size, pairs: int) -> list[Row]:
    rows = []
    for name, peer, given, goal in FIGURES:
        rows.append(compare(name, ours(place, size, **given), peer(place, size), goal, pairs))
        print(rows[-1], flush=True)
    return rows


def profile(place: Place, size: Size) -> None:
    """Profile clipft's step by operator, and compare its matrix products with plain ones."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    work = ours(place, size)
    work()
    with profiled(activities=[ProfilerActivity.CPU], with_flops=True) as found:
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
    operators = found.key_averages()
    print(operators.table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=45))
    products = [o for o in operators if o.key in {"aten::mm", "aten::addmm", "aten::bmm"}]
    done, took = sum(o.flops for o in products), sum(o.self_cpu_time_total for o in products) / 1e6
    print(f"step {seconds:.1f} s; {took / seconds:.0%} of it in matrix products, which reach")
    print(f"{done / took / 1e9:.0f} GFLOP/s; a plain 1600 x 768 x 3072 product: {peak():.0f}")


def peak() -> float:
    a, b, seconds = torch.randn(1600, 768), torch.randn(768, 3072), []
    for _ in range(20):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * 1600 * 768 * 3072 / statistics.median(seconds) / 1e9


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="folder of .jpg with .txt")
    parser.add_argument("--profile", action="store_true", help="where our own time goes")
    parser.add_argument("--effective", type=int, default=128, help="pairs of a step, in 4 parts")
    parser.add_argument("--rounds", type=int, default=3, help="counted runs of each")
    chosen = parser.parse_args()
    whole = Size(chosen.effective, chosen.effective, chosen.effective // 4)
    size, pairs = (QUICK, 1) if chosen.quick else (whole, chosen.rounds)
    with tempfile.TemporaryDirectory() as made:
        place = Place(Path(made) / "model", Path(made) / "data")
        make_model(place.model)
        pack(chosen.photos, place.data, PackOptions(), lambda done, total: None)
        if chosen.profile:
            return profile(place, size)
        rows = measured(place, size, pairs)
    packages = ("torch", "transformers", "peft", "sentence-transformers", "open_clip_torch")
    publish("P1", rows, packages, chosen.json)


if __name__ == "__main__":
    main()
