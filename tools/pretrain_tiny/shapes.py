"""Shapes and everyday things to pretrain on, built from solids; never any furniture."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from clipft.data.demo.drawing import Paint, Solid, box, column, shade

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


@dataclass(frozen=True)
class Paints:
    """The paints of a shape's main part and of its second color."""

    body: Paint
    second: Paint


Shape = tuple[list[Solid], str]
"""Solids around the origin, and the words for what was chosen, such as "with three stripes"."""


def _lathe(profile: list[tuple[float, float]], paint: Paint, x: float = 0) -> list[Solid]:
    """Make a round body from its (height, radius) pairs, from the bottom up."""
    pairs = pairwise(profile)
    return [
        column((x, 0), low[1], (low[0], high[0]), paint, high[1] / low[1], sides=10)
        for low, high in pairs
    ]


def _globe(radius: float, bottom: float, paint: Paint, x: float = 0) -> list[Solid]:
    angles = [math.pi * i / 6 for i in range(7)]
    profile = [
        (bottom + radius * (1 - math.cos(angle)), max(0.05, radius * math.sin(angle)))
        for angle in angles
    ]
    return _lathe(profile, paint, x)


def _fixed_shape(name: str, paints: Paints) -> Shape:
    """Build a shape that differs in its paints only."""
    match name:
        case "cube":
            return [box((-0.5, 0.5), (-0.5, 0.5), (0, 1), paints.body)], ""
        case "cone":
            return [column((0, 0), 0.6, (0, 1.4), paints.body, 0.05)], ""
        case "pyramid":
            return [column((0, 0), 0.8, (0, 1.1), paints.body, 0.03, sides=4)], ""
        case "ball":
            return _globe(0.6, 0, paints.body), ""
        case "arch":
            posts = [box((x, x + 0.4), (-0.3, 0.3), (0, 1.4), paints.body) for x in (-0.9, 0.5)]
            return [*posts, box((-1, 1), (-0.3, 0.3), (1.4, 1.8), paints.body)], ""
        case "cross":
            beam = box((-0.7, 0.7), (-0.2, 0.2), (0.9, 1.3), paints.body)
            return [box((-0.2, 0.2), (-0.2, 0.2), (0, 1.8), paints.body), beam], ""
        case "house":
            walls = box((-0.6, 0.6), (-0.6, 0.6), (0, 0.9), paints.body)
            roof = column((0, 0), 1.0, (0.9, 1.6), paints.second, 0.05, sides=4)
            return [walls, roof], "with a pointed roof"
        case "bottle":
            return _lathe([(0, 0.4), (1.1, 0.4), (1.4, 0.14), (1.9, 0.14)], paints.body), ""
        case "bucket":
            inside = column((0, 0), 0.55, (0.95, 1.0), Paint(shade(paints.body.color, 0.5)), 0.95)
            return [*_lathe([(0, 0.4), (1.0, 0.6)], paints.body), inside], ""
        case "vase":
            return _lathe([(0, 0.3), (0.5, 0.6), (1.1, 0.25), (1.4, 0.4)], paints.body), ""
        case "mushroom":
            cap = _lathe([(0.6, 0.8), (0.85, 0.7), (1.2, 0.15)], paints.body)
            return [*_lathe([(0, 0.3), (0.6, 0.2)], paints.second), *cap], ""
        case "snowman":
            return [
                *_globe(0.6, 0, paints.body),
                *_globe(0.4, 1.05, paints.body),
            ], "made of two balls"
        case "gift":
            body = box((-0.6, 0.6), (-0.6, 0.6), (0, 1.0), paints.body)
            front = box((-0.12, 0.12), (-0.62, -0.6), (0, 1.0), paints.second)
            return [body, front, box((-0.12, 0.12), (-0.62, 0.62), (1.0, 1.03), paints.second)], (
                "with a ribbon"
            )
        case "car":
            body = box((-1.1, 1.1), (-0.45, 0.45), (0.2, 0.65), paints.body)
            cabin = box((-0.6, 0.5), (-0.4, 0.4), (0.65, 1.1), paints.second)
            dark = Paint((30, 30, 32))
            wheels = [box((x, x + 0.4), (-0.5, 0.5), (0, 0.4), dark) for x in (-0.9, 0.5)]
            return [*wheels, body, cabin], ""
    raise ValueError(name)


def _block(paints: Paints, rng: Random) -> Shape:
    if rng.random() < 0.5:
        return [box((-0.35, 0.35), (-0.35, 0.35), (0, 2), paints.body)], "standing upright"
    return [box((-1.1, 1.1), (-0.4, 0.4), (0, 0.5), paints.body)], "lying flat"


def _cylinder(paints: Paints, rng: Random) -> Shape:
    high = rng.choice((0.3, 1.6))
    return [column((0, 0), 0.5, (0, high), paints.body)], "tall" if high > 1 else "low"


def _prism(paints: Paints, rng: Random) -> Shape:
    sides = rng.choice((3, 5, 6))
    return [column((0, 0), 0.6, (0, rng.uniform(0.5, 1.4)), paints.body, sides=sides)], (
        f"with {_NUMBERS[sides]} sides"
    )


def _tower(paints: Paints, rng: Random) -> Shape:
    floors = rng.randint(2, 6)
    solids = [
        box((-0.4, 0.4), (-0.4, 0.4), (0.5 * i, 0.5 * i + 0.5), (paints.body, paints.second)[i % 2])
        for i in range(floors)
    ]
    return solids, f"of {_NUMBERS[floors]} blocks"


def _row(paints: Paints, rng: Random) -> Shape:
    count = rng.randint(2, 6)
    solids = [box((i, i + 0.7), (-0.35, 0.35), (0, 0.7), paints.body) for i in range(count)]
    return solids, f"of {_NUMBERS[count]} cubes"


def _striped(paints: Paints, rng: Random) -> Shape:
    count, high = rng.randint(2, 6), rng.uniform(1.2, 1.8)
    step = high / count
    solids = [box((-0.6, 0.6), (-0.5, 0.5), (0, high), paints.body)]
    solids += [
        box((-0.6, 0.6), (-0.52, -0.5), (step * (i + 0.25), step * (i + 0.7)), paints.second)
        for i in range(count)
    ]
    return solids, f"with {_NUMBERS[count]} stripes"


def _slotted(paints: Paints, rng: Random) -> Shape:
    count = rng.randint(2, 6)
    wide = 0.5 * count
    dark = Paint((30, 28, 28))
    solids = [box((0, wide), (-0.4, 0.4), (0, 1), paints.body)]
    solids += [
        box((0.5 * i + 0.1, 0.5 * i + 0.4), (-0.42, -0.4), (0.15, 0.85), dark) for i in range(count)
    ]
    return solids, f"with {_NUMBERS[count]} holes"


def _walker(paints: Paints, rng: Random) -> Shape:
    """A ball on legs: the model learns legs here, but no seats or table tops."""
    count = rng.choice((3, 4))
    feet = [
        (
            0.4 * math.cos(2 * math.pi * i / count + 0.6),
            0.4 * math.sin(2 * math.pi * i / count + 0.6),
        )
        for i in range(count)
    ]
    legs = [column(foot, 0.07, (0, 0.9), paints.second, sides=4) for foot in feet]
    return [*legs, *_globe(0.6, 0.7, paints.body)], f"on {_NUMBERS[count]} legs"


def _stairs(paints: Paints, rng: Random) -> Shape:
    count = rng.randint(2, 5)
    solids = [
        box((0.4 * i, 0.4 * i + 0.4), (-0.5, 0.5), (0, 0.35 * (i + 1)), paints.body)
        for i in range(count)
    ]
    return solids, f"with {_NUMBERS[count]} steps"


def _letter(paints: Paints, rng: Random) -> Shape:
    letter = rng.choice("LUT")
    post, foot = (-0.8, -0.4), (0.0, 0.4)
    base = box((-0.8, 0.8), (-0.3, 0.3), foot, paints.body)
    if letter == "T":
        bar = box((-0.8, 0.8), (-0.3, 0.3), (1.4, 1.8), paints.body)
        return [box((-0.2, 0.2), (-0.3, 0.3), (0, 1.4), paints.body), bar], "shaped like a T"
    solids = [base, box(post, (-0.3, 0.3), (0.4, 1.7), paints.body)]
    if letter == "U":
        solids.append(box((0.4, 0.8), (-0.3, 0.3), (0.4, 1.7), paints.body))
    return solids, f"shaped like a {letter}"


def _tree(paints: Paints, rng: Random) -> Shape:
    trunk = column((0, 0), 0.13, (0, 0.8), Paint((110, 74, 46), "wood"), sides=6)
    if rng.random() < 0.5:
        return [trunk, column((0, 0), 0.6, (0.6, 2.0), paints.body, 0.05)], "with a pointed crown"
    return [trunk, *_globe(0.6, 0.7, paints.body)], "with a round crown"


def _books(paints: Paints, rng: Random) -> Shape:
    count = rng.randint(2, 6)
    solids = []
    for i in range(count):
        shift, paint = rng.uniform(-0.12, 0.12), (paints.body, paints.second)[i % 2]
        solids.append(
            box((-0.8 + shift, 0.8 + shift), (-0.55, 0.55), (0.25 * i, 0.25 * i + 0.23), paint)
        )
    return solids, f"of {_NUMBERS[count]} books"


def _fence(paints: Paints, rng: Random) -> Shape:
    count = rng.randint(3, 6)
    posts = [
        box((0.5 * i, 0.5 * i + 0.15), (-0.08, 0.08), (0, 1.2), paints.body) for i in range(count)
    ]
    rail = box((0, 0.5 * count - 0.35), (0.08, 0.14), (0.8, 0.95), paints.second)
    return [*posts, rail], f"with {_NUMBERS[count]} posts"


_VARIED: dict[str, Callable[[Paints, Random], Shape]] = {
    "block": _block, "cylinder": _cylinder, "prism": _prism, "tower": _tower, "row": _row,
    "striped block": _striped, "hollow block": _slotted, "round robot": _walker,
    "stairs": _stairs, "letter": _letter, "tree": _tree, "stack": _books, "fence": _fence,
}  # fmt: skip

# Drawn by position: another order gives other scenes
SHAPES = (
    "cube", "block", "cylinder", "cone", "pyramid", "prism", "ball", "tower", "row",
    "striped block", "hollow block", "round robot", "arch", "stairs", "cross", "letter", "house",
    "tree", "bottle", "bucket", "vase", "mushroom", "snowman", "gift", "car", "stack", "fence",
)  # fmt: skip


def build_shape(name: str, paints: Paints, rng: Random) -> Shape:
    """Build the shape of that name, one of SHAPES; ``rng`` decides what varies about it."""
    varied = _VARIED.get(name)
    return varied(paints, rng) if varied else _fixed_shape(name, paints)
