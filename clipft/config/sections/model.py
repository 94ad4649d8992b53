"""The model, what of it is trained, and the loss."""

from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import field_validator

from clipft.config.fields import Section, names_in, setting
from clipft.config.scenarios import SCENARIOS
from clipft.core.common import expand_home
from clipft.core.errors import unknown_choice


class InputSizes(NamedTuple):
    """The most tokens of a text, and pixels along a side of an image; 0 keeps the model's own."""

    context_length: int = 0
    image_size: int = 0


OWN_SIZES = InputSizes()


class ModelSettings(Section):
    title = "Model"
    model: str = setting(
        "openai/clip-vit-base-patch32",
        "Pretrained CLIP model: a Hugging Face Hub id, a local folder, a model of open_clip "
        "(open_clip:NAME/PRETRAINED, hf-hub:ID, local-dir:PATH, or a file), or 'tiny' (included in "
        "the package).",
        "fixed",
    )
    context_length: int = setting(
        0,
        "Tokens of a caption that the model reads; the rest is cut off. 0: as published. For more "
        "tokens than that, its position embeddings are stretched.",
        "fixed",
        unit="tokens",
        ge=0,
        le=4096,
    )
    image_size: int = setting(
        0,
        "Side of the images that the model reads, in pixels. 0: as published; otherwise its "
        "position embeddings are resampled.",
        "fixed",
        unit="pixels",
        ge=0,
        le=1024,
    )
    scenario: str = setting(
        "dual_lora",
        f"What to train. {'; '.join(f'{s.name}: {s.summary}' for s in SCENARIOS.values())}.",
        "fixed",
        choices=tuple(SCENARIOS),
    )
    lora_r: int = setting(16, "Rank of the LoRA adapters.", "fixed", ge=1)
    lora_alpha: float = setting(
        32, "LoRA alpha: adapter outputs are scaled by alpha / r.", "fixed", gt=0
    )
    lora_dropout: float = setting(0.05, "Dropout before the adapters.", "fixed", ge=0, lt=1)
    lora_targets: Literal["qv", "qkvo", "mlp", "all"] = setting(
        "qv",
        "Layers that get adapters. qv: query and value of attention; qkvo: all four projections "
        "of attention; mlp: the MLP; all: attention and MLP.",
        "fixed",
    )
    lora_rslora: bool = setting(
        False, "Use the scale alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023).", "fixed"
    )
    lora_dora: bool = setting(
        False, "Train magnitudes separately from directions (DoRA, Liu et al. 2024).", "fixed"
    )
    lora_init: Literal["default", "gaussian", "orthogonal", "olora", "pissa"] = setting(
        "default",
        "Initial values of the adapters: default, gaussian, orthogonal, olora or pissa. olora and "
        "pissa also change the base weights.",
        "fixed",
    )

    @property
    def input_sizes(self) -> InputSizes:
        """The sizes of texts and images."""
        return InputSizes(self.context_length, self.image_size)

    @field_validator("model")
    @classmethod
    def _expand_home(cls, value: str) -> str:
        return str(expand_home(value)) if value.startswith("~") else value

    @field_validator("scenario")
    @classmethod
    def _known_scenario(cls, value: str) -> str:
        if value not in SCENARIOS:
            raise ValueError(unknown_choice(value, SCENARIOS))
        return value


class LossSettings(Section):
    title = "Loss"
    loss: Literal["auto", "clip", "siglip"] = setting(
        "auto",
        "Contrastive loss. clip: softmax over the batch; siglip: sigmoid for each image and text; "
        "auto: the loss the model was pretrained with.",
        "fixed",
    )
    positives: Literal["pair", "caption", "group", "label"] = setting(
        "pair",
        "Which rows do not count as negatives of a pair. pair: only the pair itself; caption: rows "
        "with the same caption; group: rows with the same value of group_field; label: rows with "
        "the same value of label_field.",
        "fixed",
    )
    positives_mode: Literal["soft", "mask"] = setting(
        "soft",
        "How the rows chosen by --positives count. soft: as positives with equal shares; mask: not "
        "at all.",
        "fixed",
    )
    photo_pairs: float = setting(
        0.0,
        "Weight of a second contrastive loss, between the images alone: photos of one product, "
        "which have the same value of group_field, attract each other. Each step then holds at "
        "least two photos of a product that has several. 0: no such loss.",
        "fixed",
        ge=0,
    )
    hard_negatives: int = setting(
        0,
        "Number of look-alikes to put in the same step as an image: the nearest images of other "
        "products, according to group_field. 0: steps are drawn at random.",
        "fixed",
        unit="images",
        ge=0,
        le=16,
    )
    hard_negatives_by: Literal["pretrained", "current"] = setting(
        "pretrained",
        "Embeddings that --hard-negatives compares. pretrained: those of the pretrained model, "
        "computed once before the first step; current: those of the model in training, computed "
        "before each epoch.",
        "fixed",
    )
    logit_scale: Literal["auto", "frozen", "trained"] = setting(
        "auto",
        "The temperature, and the bias of siglip: frozen or trained. auto: trained in scenario "
        "full, and when a model without a bias is trained with siglip; otherwise frozen.",
        "fixed",
    )
    preserve: float = setting(
        0.0,
        "Weight of a penalty on how far embeddings move away from those of the pretrained model, "
        "so that the model forgets less. 0: no penalty.",
        "fixed",
        metavar="W",
        ge=0,
    )
    preserve_data: Path | None = setting(
        None,
        "A general set: other pairs (train/*.tar in this folder) on which --preserve is "
        "computed. Default: the training pairs.",
        metavar="DATA",
    )
    matryoshka: str = setting(
        "",
        "Also train embeddings that are cut off after these numbers of dimensions, such as "
        "256,128. The loss is the mean over these and all dimensions.",
        "fixed",
        metavar="N,...",
    )

    @field_validator("matryoshka")
    @classmethod
    def _numbers_of_dimensions(cls, value: str) -> str:
        for part in names_in(value):
            if not part.isdecimal() or int(part) < 2:
                raise ValueError(f"{part!r} is not a number of dimensions; write it as 256,128")
        return value

    @property
    def dimensions(self) -> tuple[int, ...]:
        """The numbers of dimensions besides the whole, the largest first."""
        return tuple(sorted({int(part) for part in names_in(self.matryoshka)}, reverse=True))


class AdaptSettings(ModelSettings, LossSettings):
    """The settings that determine a trainable model."""
