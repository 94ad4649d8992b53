"""The demo's furniture catalogue: drawn images with captions, always the same for a seed."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image

from clipft.core.errors import StorageError
from clipft.data.demo.drawing import (
    CLUTTER,
    COLORS,
    FLOORS,
    SIZE,
    WALLS,
    Canvas,
    Paint,
    Solid,
    View,
    draw_room,
    draw_solids,
    shade,
    vary,
)
from clipft.data.demo.furniture import KINDS, Kind, Paints


@dataclass(frozen=True)
class RenderedPair:
    """One drawn product: an RGB image of 128x128 pixels, its caption and its record."""

    key: str
    image: Image.Image
    caption: str
    metadata: dict[str, str]


def render_pair(seed: int, index: int) -> RenderedPair:
    """Draw one product of a catalogue; only the seed and the index decide what it looks like."""
    rng = Random(f"furniture {seed} {index}")  # noqa: S311
    # These calls draw from one generator, so changing their order changes every catalogue
    product = _choose_product(rng)
    things = rng.sample([*CLUTTER], rng.choice((0, 1, 1, 2)))
    clutter = tuple((thing, rng.choice([*COLORS])) for thing in CLUTTER if thing in things)
    stage = _Stage(rng.choice([*WALLS]), rng.choice([*FLOORS]), clutter)
    image = _draw(product, stage, rng)
    caption = _describe(product, stage, rng)
    syllables = ("lun", "vik", "or", "sta", "mel", "by", "tor", "na", "hal", "sund", "ek", "ra")
    metadata = {
        "id": f"{index:06d}",
        "name": "".join(rng.sample(syllables, 3)).upper(),
        "type": product.name,
        "color": product.color,
        "material": product.material,
        "view": product.view,
        "category": product.kind.category,
    }
    return RenderedPair(f"{seed:04d}_{index:06d}", image, caption, metadata)


@dataclass(frozen=True)
class _Product:
    """The product, in the words of the metadata. ``detail`` is as ``Kind.build`` returns it."""

    kind: Kind
    name: str
    color: str
    material: str
    frame: str
    view: str
    solids: list[Solid]
    detail: str


@dataclass(frozen=True)
class _Stage:
    """What is around the product."""

    wall: str
    floor: str
    clutter: tuple[tuple[str, str], ...]
    """(thing, color) of everything else in the room, from the back to the front."""


_FRAMES = {
    "wooden": Paint((172, 122, 74), "wood"),
    "metal": Paint((168, 172, 178), "metal"),
    "black": Paint((36, 36, 38)),
    "white": Paint((242, 242, 240)),
}

_VIEWS: dict[str, tuple[View, tuple[str, ...]]] = {
    "front": (View(0, 12), ("seen from the front", "head-on", "front elevation")),
    "side": (View(90, 12), ("seen from the side", "end-on", "side elevation")),
    "angle": (View(38, 24), ("seen at an angle", "three-quarter view", "in perspective")),
    "above": (View(24, 58), ("seen from above", "overhead shot", "looking down on it")),
}

# Words that the tiny model has not seen; it learns them in the demo.
_TRADE_COLORS = {
    "red": "crimson",
    "orange": "tangerine",
    "yellow": "mustard",
    "green": "emerald",
    "turquoise": "lagoon",
    "blue": "cobalt",
    "purple": "plum",
    "pink": "blush",
    "brown": "chestnut",
    "beige": "sand",
    "black": "ebony",
    "white": "snow",
    "grey": "slate",
}
_TRADE_MATERIALS = {
    "wood": "timber",
    "fabric": "upholstered",
    "metal": "metallic",
    "leather": "hide",
    "rattan": "woven",
    "marble": "stone",
    "velvet": "plush",
    "plastic": "moulded",
}
_TRADE_WALLS = {
    "white": "chalk",
    "cream": "vanilla",
    "grey": "pebble",
    "pale blue": "sky",
    "pale green": "mint",
    "pale pink": "rose",
    "dark grey": "graphite",
    "pale yellow": "lemon",
}
_TRADE_SHARE = 0.8
"""How often a caption uses the trade's word for a color or a material."""


def _choose_product(rng: Random) -> _Product:
    kind = rng.choice(KINDS)
    color = rng.choice([*COLORS])
    material = rng.choice(kind.materials)
    frame = rng.choice([*_FRAMES])
    body = Paint(vary(COLORS[color], rng), material)
    gain = 1.25 if sum(body.color) < 380 else 0.8
    accent = Paint(shade(body.color, gain), material)
    solids, detail = kind.build(Paints(body, _FRAMES[frame], accent), rng)
    view = rng.choice([*_VIEWS])
    return _Product(kind, rng.choice(kind.names), color, material, frame, view, solids, detail)


def _draw(product: _Product, stage: _Stage, rng: Random) -> Image.Image:
    canvas = Canvas(WALLS[stage.wall])
    floor, texture = FLOORS[stage.floor]
    ground = rng.uniform(106, 118)
    draw_room(canvas, vary(WALLS[stage.wall], rng, 5), Paint(floor, texture), ground - 24)
    edges = [rng.uniform(16, 22), SIZE - rng.uniform(16, 22)]
    rng.shuffle(edges)
    for (name, color), x in zip(stage.clutter, edges, strict=False):
        CLUTTER[name](canvas, x, ground + 2, vary(COLORS[color], rng), rng)
    half, high = rng.uniform(44, 56), rng.uniform(76, 98)
    middle = SIZE / 2 + rng.uniform(-6, 6)
    turn = rng.choice((1, -1)) * rng.uniform(0.85, 1.1)
    pose = _VIEWS[product.view][0]
    view = View(pose.yaw * (turn if pose.yaw < 90 else 1), pose.pitch + rng.uniform(-3, 3))
    frame = (middle - half, ground - high, middle + half, ground)
    draw_solids(canvas, product.solids, view, frame)
    return canvas.finish(rng)


def _describe(product: _Product, stage: _Stage, rng: Random) -> str:
    """Write a caption of 6 to 25 words; details that do not fit are dropped."""
    color, material = product.color, product.material
    if rng.random() < _TRADE_SHARE:
        color = _TRADE_COLORS[color]
    if rng.random() < _TRADE_SHARE:
        material = _TRADE_MATERIALS[material]
    thing = f"{color} {material} {product.name}"
    things = [f"a {_TRADE_COLORS[color]} {thing}" for thing, color in stage.clutter]
    things = [t.replace("a emerald", "an emerald").replace("a ebony", "an ebony") for t in things]
    around = [f"{rng.choice(('with', 'beside', 'near'))} {' and '.join(things)}"] if things else []
    wall = f"{rng.choice(('against', 'in front of'))} a {_TRADE_WALLS[stage.wall]} wall"
    closing = [f"on a {stage.floor}"]
    if any(solid.paint is _FRAMES[product.frame] for solid in product.solids):
        on_a_post = product.kind.category == "lighting" or "round top" in product.detail
        closing.append(f"{product.frame} {'base' if on_a_post else 'legs'}")
    rng.shuffle(closing)
    parts = [product.detail, rng.choice(_VIEWS[product.view][1]), *around, wall, *closing]

    lead = rng.choice(("{} ", "{}, ", "A photo of {} ", "Product picture: {} "))
    article = "an" if thing[0] in "aeiou" else "a"
    text = lead.format(f"{article} {thing}") + f"{parts[0]}, {parts[1]}"
    for part in parts[2:]:
        if len(f"{text} {part}".split()) <= 24:
            text += f", {part}"
    return text[0].upper() + text[1:] + "."


_VAL_EVERY = 8
"""Every eighth product is for validation."""
_QUALITY = 92


def write_catalogue(
    folder: Path, pairs: int, seed: int, report: Callable[[int, int], None]
) -> None:
    """Render ``pairs`` products as .jpg, .txt and .json files in train/ and val/.

    A product whose caption has been used before is skipped, so that none in train/ is repeated
    in val/. ``report`` is called with (done, total).

    Raises:
        StorageError: the folder cannot be written.
    """
    seen: set[str] = set()
    try:
        for split in ("train", "val"):
            (folder / split).mkdir(parents=True, exist_ok=True)
        for number in range(pairs):
            pair = render_pair(seed, number)
            if pair.caption not in seen:
                split = "val" if number % _VAL_EVERY == _VAL_EVERY - 1 else "train"
                stem = folder / split / pair.key
                pair.image.save(stem.with_suffix(".jpg"), quality=_QUALITY)
                stem.with_suffix(".txt").write_text(pair.caption, encoding="utf-8")
                metadata = json.dumps(pair.metadata, ensure_ascii=False, sort_keys=True)
                stem.with_suffix(".json").write_text(metadata, encoding="utf-8")
            seen.add(pair.caption)
            report(number + 1, pairs)
    except OSError as error:
        raise StorageError(
            f"cannot write {error.filename or folder}: {error.strerror}",
            "free some space or choose another --output-dir",
        ) from error
