"""The scenarios: which parts of CLIP are trained. To add one, add an entry to ``SCENARIOS``.

These are plain declarations without torch, because settings, help and documentation read them
too; ``clipft.models.trainable.adapt`` turns one into a trainable model.
"""

from dataclasses import dataclass
from typing import Literal

Tower = Literal["vision", "text"]

VISUAL, TEXTUAL = "visual_projection", "text_projection"

CHECKPOINT_SUFFIX = "_checkpoint.pt"
"""Follows the scenario in the file name of a run's checkpoint."""


@dataclass(frozen=True)
class Scenario:
    """Which weights a run trains.

    ``lora`` names the towers that get adapters, ``projections`` those that are trained whole;
    ``full`` trains every weight. ``lr`` replaces the general default of the learning rate.
    """

    name: str
    summary: str
    lora: tuple[Tower, ...] = ()
    projections: tuple[str, ...] = ()
    full: bool = False
    lr: float | None = None

    @property
    def trains(self) -> bool:
        return self.full or bool(self.lora or self.projections)

    @property
    def trains_images(self) -> bool:
        """True if training changes the embeddings of images."""
        return self.full or "vision" in self.lora or VISUAL in self.projections


SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario("zero_shot", "the pretrained model, without training"),
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
        Scenario("full", "every weight", full=True, lr=1e-5),
    )
}
