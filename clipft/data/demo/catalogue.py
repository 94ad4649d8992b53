"""The demo's furniture catalogue: drawn pictures with captions, the same for the same seed."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image

from clipft.core.errors import StorageError
from clipft.data.demo.drawing import (
    CLUTTER,
    COLOURS,
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
from clipft.data.demo.furniture import KINDS, Kind, Look


@dataclass(frozen=True)
class RenderedPair:
    """One drawn product: an RGB image of 128x128, its caption and its catalogue record."""

    key: str
    image: Image.Image
    caption: str
    metadata: dict[str, str]


def render_catalogue(pairs: int, seed: int) -> Iterator[RenderedPair]:
    """The first ``pairs`` pairs of the catalogue of ``seed``."""
    return (render_pair(seed, index) for index in range(pairs))


def render_pair(seed: int, index: int) -> RenderedPair:
    """One pair; it depends on nothing but the seed and its index."""
    rng = Random(f"furniture {seed} {index}")  # noqa: S311
    product = _draw_product(rng)
    stage = _draw_stage(rng)
    image = _draw(product, stage, rng)
    return RenderedPair(
        key=f"{seed:04d}_{index:06d}",
        image=image,
        caption=_describe(product, stage, rng),
        metadata=_record(product, index, rng),
    )


@dataclass(frozen=True)
class _Product:
    kind: Kind
    name: str
    colour: str
    material: str
    frame: str
    view: str
    solids: list[Solid]
    detail: str


@dataclass(frozen=True)
class _Stage:
    wall: str
    floor: str
    clutter: tuple[tuple[str, str], ...]
    """(thing, colour) of everything around the product."""


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

# A catalogue's own words: a model that knows only the plain ones has them to learn.
_TRADE_COLOURS = {
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


def _draw_product(rng: Random) -> _Product:
    kind = rng.choice(KINDS)
    colour = rng.choice([*COLOURS])
    material = rng.choice(kind.materials)
    frame = rng.choice([*_FRAMES])
    body = Paint(vary(COLOURS[colour], rng), material)
    gain = 1.25 if sum(body.colour) < 380 else 0.8
    accent = Paint(shade(body.colour, gain), material)
    solids, detail = kind.build(Look(body, _FRAMES[frame], accent), rng)
    view = rng.choice([*_VIEWS])
    return _Product(kind, rng.choice(kind.names), colour, material, frame, view, solids, detail)


def _draw_stage(rng: Random) -> _Stage:
    things = rng.sample([*CLUTTER], rng.choice((0, 1, 1, 2)))
    clutter = tuple((thing, rng.choice([*COLOURS])) for thing in CLUTTER if thing in things)
    return _Stage(rng.choice([*WALLS]), rng.choice([*FLOORS]), clutter)


def _draw(product: _Product, stage: _Stage, rng: Random) -> Image.Image:
    canvas = Canvas(WALLS[stage.wall])
    floor, texture = FLOORS[stage.floor]
    ground = rng.uniform(106, 118)
    draw_room(canvas, vary(WALLS[stage.wall], rng, 5), Paint(floor, texture), ground - 24)
    edges = [rng.uniform(16, 22), SIZE - rng.uniform(16, 22)]
    rng.shuffle(edges)
    for (name, colour), x in zip(stage.clutter, edges, strict=False):
        CLUTTER[name](canvas, x, ground + 2, vary(COLOURS[colour], rng), rng)
    half, high = rng.uniform(44, 56), rng.uniform(76, 98)
    middle = SIZE / 2 + rng.uniform(-6, 6)
    turn = rng.choice((1, -1)) * rng.uniform(0.85, 1.1)
    pose = _VIEWS[product.view][0]
    view = View(pose.yaw * (turn if pose.yaw < 90 else 1), pose.pitch + rng.uniform(-3, 3))
    frame = (middle - half, ground - high, middle + half, ground)
    draw_solids(canvas, product.solids, view, frame)
    return canvas.finish(rng)


def _describe(product: _Product, stage: _Stage, rng: Random) -> str:
    """A caption of 6 to 25 words; what does not fit is left out from the end."""
    colour, material = product.colour, product.material
    if rng.random() < _TRADE_SHARE:
        colour = _TRADE_COLOURS[colour]
    if rng.random() < _TRADE_SHARE:
        material = _TRADE_MATERIALS[material]
    thing = f"{colour} {material} {product.name}"
    parts = [product.detail, *_more(product, stage, rng)]
    parts.insert(1, rng.choice(_VIEWS[product.view][1]))
    lead = rng.choice(("{} ", "{}, ", "A photo of {} ", "Product picture: {} "))
    article = "an" if thing[0] in "aeiou" else "a"
    text = lead.format(f"{article} {thing}") + f"{parts[0]}, {parts[1]}"
    for part in parts[2:]:
        if len(f"{text} {part}".split()) <= 24:
            text += f", {part}"
    return text[0].upper() + text[1:] + "."


def _more(product: _Product, stage: _Stage, rng: Random) -> list[str]:
    """Phrases on the surroundings, the legs and the wall, in varied words."""
    things = [f"a {_TRADE_COLOURS[colour]} {thing}" for thing, colour in stage.clutter]
    things = [thing.replace("a emerald", "an emerald") for thing in things]
    things = [thing.replace("a ebony", "an ebony") for thing in things]
    around = [f"{rng.choice(('with', 'beside', 'near'))} {' and '.join(things)}"] if things else []
    wall = f"{rng.choice(('against', 'in front of'))} a {_TRADE_WALLS[stage.wall]} wall"
    closing = [f"on a {stage.floor}"]
    if any(solid.paint is _FRAMES[product.frame] for solid in product.solids):
        on_a_post = product.kind.category == "lighting" or "round top" in product.detail
        closing.append(f"{product.frame} {'base' if on_a_post else 'legs'}")
    rng.shuffle(closing)
    return [*around, wall, *closing]


def _record(product: _Product, index: int, rng: Random) -> dict[str, str]:
    syllables = ("lun", "vik", "or", "sta", "mel", "by", "tor", "na", "hal", "sund", "ek", "ra")
    return {
        "id": f"{index:06d}",
        "name": "".join(rng.sample(syllables, 3)).upper(),
        "type": product.name,
        "color": product.colour,
        "material": product.material,
        "view": product.view,
        "category": product.kind.category,
    }


VAL_SHARE = 0.125
_QUALITY = 92


def write_catalogue(
    folder: Path, pairs: int, seed: int, report: Callable[[int, int], None]
) -> None:
    """Render ``pairs`` products as .jpg, .txt and .json; every eighth goes to val/.

    A caption that stands in train/ is not repeated in val/: such a product is left out.
    ``report`` is told how many of how many are done.

    Raises:
        StorageError: the folder cannot be written.
    """
    seen: set[str] = set()
    every = round(1 / VAL_SHARE)
    try:
        for split in ("train", "val"):
            (folder / split).mkdir(parents=True, exist_ok=True)
        for number in range(pairs):
            pair = render_pair(seed, number)
            if pair.caption not in seen:
                split = "val" if number % every == every - 1 else "train"
                _write(folder / split / pair.key, pair)
            seen.add(pair.caption)
            report(number + 1, pairs)
    except OSError as error:
        raise StorageError(
            f"cannot write {error.filename or folder}: {error.strerror}",
            "make room or choose another --output-dir",
        ) from error


def _write(stem: Path, pair: RenderedPair) -> None:
    pair.image.save(stem.with_suffix(".jpg"), quality=_QUALITY)
    stem.with_suffix(".txt").write_text(pair.caption, encoding="utf-8")
    metadata = json.dumps(pair.metadata, ensure_ascii=False, sort_keys=True)
    stem.with_suffix(".json").write_text(metadata, encoding="utf-8")
