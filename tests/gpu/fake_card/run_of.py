"""clipft's own training step on the fake card: all that knows how a run is put together."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from transformers import CLIPConfig, CLIPModel

from clipft.config.settings import Settings
from clipft.config.sources import load_settings
from clipft.data.batch import Batch, StepBatch
from clipft.data.order import EpochPlan
from clipft.data.positives import NO_GROUPS, CaptionPositives
from clipft.distributed.collectives import ALONE
from clipft.embedding import load
from clipft.embedding.towers import choose_shapes, make_towers
from clipft.models.pretrained import ModelInputs, PretrainedModel
from clipft.models.trainable import TrainableModel
from clipft.runs.folder import RunPaths
from clipft.runs.records import Callbacks, StepResult
from clipft.training.checkpointing import Saver
from clipft.training.loop import fit
from clipft.training.prepare import prepare
from clipft.training.run import _Run
from clipft.training.setup import RunSetup
from clipft.training.signals import StopRequest
from clipft.training.state import TrainState
from clipft.training.step.losses import make_loss
from clipft.training.step.weights import WHOLE_WEIGHTS
from tests.gpu.fake_card.card import Card, move

_END = 49407
_LARGE = {"patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "B/32": {},
    "L/14": {
        "vision_config": {**_LARGE, "num_hidden_layers": 24, "num_attention_heads": 16},
        "text_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "projection_dim": 768,
        },
        "projection_dim": 768,
    },
}


def random_clip(name: str, input_sizes: object = None) -> PretrainedModel:
    """A model of a published size, whose weights have a shape and no values."""
    config = CLIPConfig(**CONFIGURATIONS[name])
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        clip = CLIPModel(config)
    config.text_config.eos_token_id = clip.text_model.eos_token_id = _END
    tokenizer: Any = SimpleNamespace(eos_token_id=_END)
    inputs = ModelInputs(tokenizer, 77, 224, (0.5,) * 3, (0.5,) * 3)
    return PretrainedModel(name, clip.eval(), inputs, sum(p.numel() for p in clip.parameters()))


@contextmanager
def loading_on(card: Card, model: str) -> Iterator[None]:
    """Let ``load_model`` take its true steps, and put only the weights on the fake card."""

    def to(model: TrainableModel, device: Any) -> TrainableModel:
        move(model, card)
        return model

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(TrainableModel, "to", to))
        if model in CONFIGURATIONS:
            patches.enter_context(mock.patch.object(load, "load_pretrained", random_clip))
            named = mock.patch.object(PretrainedModel, "fingerprint", lambda base: base.name)
            patches.enter_context(named)
        patches.enter_context(card)
        yield


@dataclass
class Run:
    """A run of a few steps on the card, from batches on the CPU to changed weights."""

    settings: Settings
    loaded: load.LoadedModel
    card: Card
    state: TrainState = field(init=False)

    def __post_init__(self) -> None:
        with self.card:
            self.setup = _setup(self.settings, self.loaded)
            optimizer = self.setup.make_optimizer()
            self.state = TrainState(self.loaded.model, optimizer, steps_per_epoch=100)
            self.accumulate = self.setup.make_accumulation(optimizer, print)

    @classmethod
    def of(cls, **flags: Any) -> "Run":
        """A run with these settings."""
        given = {"device": "cuda", "data_dir": "none", **flags}
        settings = load_settings(given, environ={}).values
        card = Card()
        with loading_on(card, settings.model):
            return cls(settings, load.load_model(settings), card)

    def steps(self, longest: Sequence[int] = (30,)) -> list[StepResult]:
        """Train on as many batches, whose longest captions have so many tokens."""
        pairs = self.settings.effective_batch_size
        batches = [
            StepBatch(0, i, self._micro_batches(tokens), [], pairs)
            for i, tokens in enumerate(longest)
        ]
        with self.card:
            return list(fit(self.state, batches, self.accumulate))

    def batch(self, pairs: int, tokens: int = 30, differing: int = 20) -> Batch:
        """Pairs on the CPU whose captions have ``differing`` lengths, up to ``tokens``."""
        inputs = self.loaded.base.inputs
        end = int(inputs.tokenizer.eos_token_id)
        lengths = (tokens - 1 - torch.arange(pairs) % differing).clamp(min=2)
        places, rows = torch.arange(tokens), torch.arange(pairs)[:, None]
        ids = (1 + rows // 50 ** (places % 3) % 50 + places % 3).where(
            places < lengths[:, None], end
        )
        ids[:, 0] = end - 1
        pixels = torch.zeros(pairs, 3, inputs.image_size, inputs.image_size, dtype=torch.uint8)
        return Batch(pixels, ids, tuple(range(pairs)))

    def _micro_batches(self, tokens: int) -> list[Batch]:
        pairs = self.settings.effective_batch_size
        micro, whole = self.settings.micro_batch_size or pairs, self.batch(pairs, tokens)
        whole.input_ids[-1] = whole.input_ids[0]  # a caption that occurs twice
        return [whole.part(slice(i, i + micro)) for i in range(0, pairs, micro)]


def _setup(settings: Settings, loaded: load.LoadedModel) -> RunSetup:
    pad = int(loaded.base.inputs.tokenizer.eos_token_id)
    effective = settings.effective_batch_size
    micro = settings.micro_batch_size or effective
    absent: Any = None
    shapes = choose_shapes(loaded, settings.compile, micro, effective)
    towers = make_towers(loaded, settings.seed, pad, shapes)
    encoding: Any = SimpleNamespace(towers=towers)
    plan: Any = SimpleNamespace(
        optimizer="adamw", total_steps=100, warmup_steps=0, micro_batch_size=micro, epochs=1
    )
    grouped = settings.positives == "caption"
    positives = CaptionPositives(pad) if grouped else NO_GROUPS
    return RunSetup(
        settings=settings,
        loaded=loaded,
        train=absent,
        val=absent,
        encoding=encoding,
        val_encoding=encoding,
        val_preprocessing=absent,
        positives=positives,
        val_positives=positives,
        loss=make_loss(settings, loaded.model),
        epoch_plan=EpochPlan(100 * effective, effective, micro, settings.seed),
        plan=plan,
        processes=ALONE,
        weights=WHOLE_WEIGHTS,
    )


@dataclass
class WholeRun:
    """A run on real pairs with all its parts: the loader, the steps, the validation.

    Only its checkpoints are not written. ``chosen`` are settings by name.
    """

    data_dir: Path
    chosen: dict[str, Any]
    card: Card = field(default_factory=Card)

    def __post_init__(self) -> None:
        given = {"model": "tiny", "device": "cuda", "data_dir": str(self.data_dir), "epochs": 1}
        settings = load_settings({**given, **self.chosen}, environ={}).values
        with loading_on(self.card, settings.model):
            setup = prepare(settings, print_to_stderr, ALONE)
            paths = RunPaths(settings.run_dir)
            self.run = _Run(setup, paths, Callbacks(), StopRequest())

    def train(self) -> None:
        """Train one epoch."""
        with ExitStack() as unsaved:
            for name in ("save", "save_best", "save_if_due"):
                unsaved.enter_context(mock.patch.object(Saver, name, lambda *_, **__: None))
            unsaved.enter_context(mock.patch.object(_Run, "_keep_rankings", lambda *_, **__: None))
            with self.card:
                self.run.train_epochs()

    def validate(self) -> None:
        """Validate once."""
        with self.card:
            self.run._validate(0, None)


def print_to_stderr(said: str) -> None:
    print(said, file=sys.stderr)
