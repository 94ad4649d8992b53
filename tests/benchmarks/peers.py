"""The peers of several benchmarks, set up as in their documentation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import clipft.models

TINY = Path(clipft.models.__file__).parent / "tiny"
"""The folder of the packaged model."""


@dataclass(frozen=True)
class Machine:
    """The device of a benchmark, which computes in fp32 on a CPU, and else with bf16 autocast."""

    device: str = "cpu"
    workers: int = 0

    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments of a Trainer that only trains and writes nothing."""
        return {
            "save_strategy": "no",
            "report_to": "none",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "use_cpu": self.device == "cpu",
            "bf16": self.device != "cpu",
            "dataloader_num_workers": self.workers,
        }


CPU = Machine()


def adapted(clip: Any) -> Any:
    """Add the adapters of ``dual_lora``: LoRA on q and v of both encoders, and both projections in
    full."""
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["visual_projection", "text_projection"],
    )
    return get_peft_model(clip, config)


def stacked(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate samples as in transformers' CLIP example."""
    return {k: torch.stack([row[k] for row in rows]) for k in rows[0]} | {"return_loss": True}


def train_with_cached_loss(
    module: Any,
    images: list[Any],
    texts: list[str],
    micro: int,
    how: dict[str, Any],
    machine: Machine = CPU,
    scale: float = 100.0,
) -> None:
    """Train with sentence-transformers' cached loss in both directions, ``micro`` pairs at a
    time."""
    from datasets import Dataset
    from datasets import Image as ImageColumn
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

    model = SentenceTransformer(modules=[module], device=machine.device)
    data = Dataset.from_dict({"image": images, "text": texts}).cast_column("image", ImageColumn())
    loss = CachedMultipleNegativesRankingLoss(
        model,
        scale=scale,
        mini_batch_size=micro,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    arguments = SentenceTransformerTrainingArguments(**how, **machine.trainer_arguments())
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss).train()


def adapted_transformer(model: Path) -> Any:
    """Return a sentence-transformers module with the CLIP from a folder and added adapters."""
    from sentence_transformers.base.modules import Transformer

    module = Transformer(str(model))
    module.model = adapted(module.model)
    return module
