"""Recognizes names of models in open_clip's notation. It imports nothing heavy."""

from pathlib import Path

REGISTRY, HUB, FOLDER = "open_clip:", "hf-hub:", "local-dir:"
CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = (".pt", ".pth", ".bin", ".safetensors")


def is_open_clip(name: str) -> bool:
    """Return True for a model in open_clip's notation, a file of weights, or a folder that
    open_clip wrote."""
    if name.startswith((REGISTRY, HUB, FOLDER)):
        return True
    path = Path(name)
    if path.suffix in WEIGHT_FILES:
        return not path.is_dir()
    return (path / CONFIG_FILE).is_file() and not (path / "config.json").is_file()


def names_weights(place: str) -> bool:
    """Return True for a model of open_clip, False for a checkpoint of clipft.

    A ``.pt`` file is a checkpoint of clipft, unless an open_clip configuration is in its folder.
    """
    path = Path(place)
    if path.suffix == ".pt" and not place.startswith((REGISTRY, HUB, FOLDER)):
        return path.is_file() and (path.parent / CONFIG_FILE).is_file()
    return is_open_clip(place)


def public_open_clip_name(name: str) -> str:
    """Return a name in open_clip's notation without the path of a local folder or file."""
    prefix = next((p for p in (REGISTRY, HUB, FOLDER) if name.startswith(p)), "")
    rest = name.removeprefix(prefix)
    if prefix == HUB:
        return name
    if prefix == REGISTRY:
        model, _, pretrained = rest.partition("/")
        return f"{prefix}{model}/{Path(pretrained).name}"
    return Path(rest).resolve().name
