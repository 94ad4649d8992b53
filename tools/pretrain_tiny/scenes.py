"""Scenes to pretrain on: shapes and everyday things in rooms, and never any furniture."""

from dataclasses import dataclass
from random import Random

from PIL import Image

from clipft.data.demo.drawing import (
    CLUTTER,
    COLORS,
    FLOORS,
    MATERIALS,
    SIZE,
    WALLS,
    Canvas,
    Paint,
    Solid,
    View,
    draw_room,
    draw_solids,
    vary,
)
from tools.pretrain_tiny.shapes import SHAPES, Paints, build_shape


@dataclass(frozen=True)
class Scene:
    """An RGB image of 128x128 pixels, and captions of it in different words."""

    image: Image.Image
    captions: tuple[str, ...]


def render_scene(seed: int, index: int, captions: int = 1) -> Scene:
    """Draw one scene; only the seed and the index decide what it looks like."""
    rng = Random(f"scene {seed} {index}")  # noqa: S311
    view = rng.choice([*_VIEWS])
    things = [_choose_thing(view, rng) for _ in range(rng.choice((1, 1, 1, 2)))]
    stage = _choose_stage(rng)
    image = _draw(things, stage, rng)
    return Scene(image, tuple(_describe(things, stage, rng) for _ in range(captions)))


_VIEWS: dict[str, tuple[View, tuple[str, ...]]] = {
    "front": (View(0, 12), ("seen from the front", "front view", "facing the camera")),
    "side": (View(90, 12), ("seen from the side", "side view", "in profile")),
    "angle": (View(38, 24), ("seen at an angle", "shown at an angle", "turned to one side")),
    "above": (View(24, 58), ("seen from above", "from above", "viewed from a high angle")),
}

_ALSO: dict[tuple[str, str], tuple[str, ...]] = {
    ("grey", "metal"): ("silver", "steel", "chrome", "aluminium", "galvanised"),
    ("white", "metal"): ("silver", "stainless steel"),
    ("yellow", "metal"): ("brass", "gold"),
    ("brown", "wood"): ("walnut", "black-brown", "dark", "brown stained"),
    ("beige", "wood"): ("pine", "birch", "oak", "beech", "ash", "pale", "solid"),
    ("beige", "fabric"): ("natural", "linen"),
    ("beige", "rattan"): ("natural", "bamboo"),
    ("turquoise", ""): ("blue-green", "light blue"),
}
"""Other words for the color of a material, as catalogues use them."""


@dataclass(frozen=True)
class _Thing:
    """A shape in a scene, in the words of its captions."""

    name: str
    color: str
    material: str
    second: str
    view: str
    solids: list[Solid]
    detail: str
    share: float
    """Share of the image's height that it may fill."""


@dataclass(frozen=True)
class _Stage:
    """What is around the shapes."""

    wall: str
    floor: str
    """Empty if the wall's color fills the whole image, as in a studio."""
    clutter: tuple[tuple[str, str], ...]


def _choose_thing(view: str, rng: Random) -> _Thing:
    name, color, second = rng.choice([*SHAPES]), *rng.sample([*COLORS], 2)
    material = rng.choice(("", *MATERIALS))
    body = Paint(vary(COLORS[color], rng), material or "plain")
    paints = Paints(body, Paint(vary(COLORS[second], rng)))
    solids, detail = build_shape(name, paints, rng)
    uses_second = any(solid.paint is paints.second for solid in solids)
    share = rng.uniform(0.3, 0.8)
    return _Thing(name, color, material, second if uses_second else "", view, solids, detail, share)


def _choose_stage(rng: Random) -> _Stage:
    if rng.random() < 0.25:
        return _Stage(rng.choice(("white", "white", *WALLS)), "", ())
    things = rng.sample([*CLUTTER], rng.choice((0, 1, 1, 2)))
    clutter = tuple((thing, rng.choice([*COLORS])) for thing in CLUTTER if thing in things)
    return _Stage(rng.choice([*WALLS]), rng.choice([*FLOORS]), clutter)


def _draw(things: list[_Thing], stage: _Stage, rng: Random) -> Image.Image:
    wall = vary(WALLS[stage.wall], rng, 5)
    canvas = Canvas(wall)
    ground = rng.uniform(96, 118)
    if stage.floor:
        draw_room(canvas, wall, Paint(*FLOORS[stage.floor]), ground - rng.uniform(14, 40))
    edges = [rng.uniform(16, 24), SIZE - rng.uniform(16, 24)]
    rng.shuffle(edges)
    for (name, color), x in zip(stage.clutter, edges, strict=False):
        CLUTTER[name](canvas, x, ground + 2, vary(COLORS[color], rng), rng)
    middles = [44.0, 88.0] if len(things) == 2 else [SIZE / 2 + rng.uniform(-14, 14)]
    for thing, middle in zip(things, middles, strict=True):
        pose, turn = _VIEWS[thing.view][0], rng.choice((1, -1)) * rng.uniform(0.85, 1.1)
        view = View(pose.yaw * (turn if pose.yaw < 90 else 1), pose.pitch + rng.uniform(-3, 3))
        high = thing.share * 110
        half = min(high / 2, 60 / len(things))
        frame = (middle - half, ground - high, middle + half, ground)
        draw_solids(canvas, thing.solids, view, frame)
    return canvas.finish(rng)


def _describe(things: list[_Thing], stage: _Stage, rng: Random) -> str:
    lead = rng.choice(("{}", "{}", "A photo of {}", "A picture of {}", "There is {}"))
    relation = rng.choice((" next to ", " and ", " beside "))
    phrases = [lead.format(relation.join(_name(thing, rng) for thing in things))]
    more = [rng.choice(_VIEWS[things[0].view][1])]
    around = [_article(f"{color} {thing}") for thing, color in stage.clutter]
    if around:
        more.append(f"{rng.choice(('with', 'beside', 'near'))} {' and '.join(around)}")
    if stage.floor:
        more.append(f"{rng.choice(('against', 'in front of', 'before'))} a {stage.wall} wall")
        more.append(f"on a {stage.floor}")
    else:
        more.append(f"on a {rng.choice(('', 'plain '))}{stage.wall} background")
    if rng.random() < 0.3:
        rng.shuffle(more)
    phrases += [phrase for phrase in more if rng.random() < 0.65]
    text = rng.choice((", ", " ")).join(phrases)
    return text[0].upper() + text[1:] + rng.choice((".", ""))


def _name(thing: _Thing, rng: Random) -> str:
    color = thing.color
    if rng.random() < 0.3:
        color = rng.choice(_ALSO.get((color, thing.material), (color,)))
    made = {"wood": "wooden"}.get(thing.material, thing.material)
    words = [
        rng.choice(("small", "little")) if thing.share < 0.42 else "",
        rng.choice(("large", "big")) if thing.share > 0.68 else "",
        color,
    ]
    if thing.material and rng.random() < 0.3:
        words += [thing.name, f"made of {thing.material}"]
    else:
        words += [rng.choice((made, thing.material)), thing.name]
    words.append(thing.detail)
    if thing.second and rng.random() < 0.6:
        words.append(f"and {thing.second} parts" if thing.detail else f"with {thing.second} parts")
    return _article(" ".join(word for word in words if word))


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
