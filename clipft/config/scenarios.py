"""The scenarios: which part of CLIP learns. Adding one is adding a line to ``SCENARIOS``.

Pure declarations without torch, because settings, help and documentation read them too;
``modelling.adapt`` turns one into a trainable model.
"""

from dataclasses import dataclass
from typing import Literal

Tower = Literal["vision", "text"]

VISUAL, TEXTUAL = "visual_projection", "text_projection"

CHECKPOINT_SUFFIX = "_checkpoint.pt"
"""Follows the scenario in the file name of a run's checkpoint."""


@dataclass(frozen=True)
class Scenario:
    """``lora`` towers get adapters, ``projections`` are trained whole, ``full`` trains all."""

    name: str
    summary: str
    lora: tuple[Tower, ...] = ()
    projections: tuple[str, ...] = ()
    full: bool = False
    lr: float | None = None
    """Learning rate that differs from the general default of the settings."""

    @property
    def trains(self) -> bool:
        return self.full or bool(self.lora or self.projections)


SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario("zero_shot", "the untouched model; nothing trains"),
        Scenario("linear_probe", "both projections", projections=(VISUAL, TEXTUAL), lr=1e-3),
        Scenario(
            "dual_lora",
            "LoRA in both encoders, and both projections",
            lora=("vision", "text"),
            projections=(VISUAL, TEXTUAL),
        ),
        Scenario(
            "vision_lora",
            "LoRA in the vision encoder, and its projection",
            lora=("vision",),
            projections=(VISUAL,),
        ),
        Scenario(
            "text_lora",
            "LoRA in the text encoder, and its projection",
            lora=("text",),
            projections=(TEXTUAL,),
        ),
        Scenario("full", "every weight", full=True),
    )
}
