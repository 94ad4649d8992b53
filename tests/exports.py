"""Makes checkpoints of every scenario without training, by random changes of trainable weights."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from clipft.config.settings import Settings
from clipft.embedding.load import load_model
from clipft.runs.checkpoint import save_checkpoint
from clipft.runs.load import OpenedModel, open_model
from clipft.runs.records import EpochResult
from tests.loaded_settings import loaded_settings


def write_checkpoint(folder: Path, scenario: str, **more: Any) -> Path:
    """Write a checkpoint of the tiny model like that of a run."""
    settings = Settings(model="tiny", scenario=scenario, device="cpu", precision="fp32", **more)
    loaded = load_model(settings)
    generator = torch.Generator().manual_seed(3)
    state = {
        name: weight + 0.02 * torch.randn(weight.shape, generator=generator)
        for name, weight in loaded.model.trainable_state().items()
    }
    figures = {"r@1": 0.1, "r@5": 0.2, "r@10": 0.3, "median_rank": 9.0, "mrr": 0.2}
    retrieval = {"pairs": 40, "text_to_image": figures, "image_to_text": figures}
    before = EpochResult(0, 0, None, 5.0, retrieval)
    path = folder / f"{scenario}_checkpoint.pt"
    content = {
        "epoch": 3,
        "model_state_dict": state,
        "settings": settings.model_dump(mode="json"),
        "base_model": loaded.identity,
        "train_pairs": 96,
        "before": asdict(before),
        "best": asdict(EpochResult(2, 6, 3.0, 4.0, retrieval)) if state else None,
    }
    save_checkpoint(path, content)
    return path


def opened(place: object) -> OpenedModel:
    """Open a model on the CPU in fp32."""
    now = loaded_settings(device="cpu", precision="fp32")
    return open_model(str(place), now, ("device", "precision"))
