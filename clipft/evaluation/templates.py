"""Prompts that turn a label into sentences, for classification without training."""

TEMPLATES: dict[str, tuple[str, ...]] = {
    "general": (
        "a photo of a {}.",
        "a photo of the {}.",
        "a good photo of a {}.",
        "a close-up photo of a {}.",
        "a bright photo of a {}.",
        "a picture of a {}.",
        "itap of a {}.",
    ),
    "furniture": (
        "a photo of a {}.",
        "a product photo of a {}.",
        "a {} on a white background.",
        "a {} in a room.",
        "a {}, furniture.",
        "a catalogue picture of a {}.",
        "{}",
    ),
}
