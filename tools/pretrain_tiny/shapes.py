"""Shapes and plain everyday things to pretrain on, built of solids; never any furniture."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from clipft.data.demo.drawing import Paint, Solid, box, column, shade

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


@dataclass(frozen=True)
class Looks:
    body: Paint
    second: Paint


Shape = tuple[list[Solid], str]
"""Solids around the origin, and the words of what was chosen, such as "with three stripes"."""


def _lathe(profile: list[tuple[float, float]], paint: Paint, x: float = 0) -> list[Solid]:
    """Turned on a lathe: (height, radius) from the bottom up."""
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


def _cube(looks: Looks, rng: Random) -> Shape:
    return [box((-0.5, 0.5), (-0.5, 0.5), (0, 1), looks.body)], ""


def _block(looks: Looks, rng: Random) -> Shape:
    if rng.random() < 0.5:
        return [box((-0.35, 0.35), (-0.35, 0.35), (0, 2), looks.body)], "standing upright"
    return [box((-1.1, 1.1), (-0.4, 0.4), (0, 0.5), looks.body)], "lying flat"


def _cylinder(looks: Looks, rng: Random) -> Shape:
    high = rng.choice((0.3, 1.6))
    return [column((0, 0), 0.5, (0, high), looks.body)], "tall" if high > 1 else "low"


def _cone(looks: Looks, rng: Random) -> Shape:
    return [column((0, 0), 0.6, (0, 1.4), looks.body, 0.05)], ""


def _pyramid(looks: Looks, rng: Random) -> Shape:
    return [column((0, 0), 0.8, (0, 1.1), looks.body, 0.03, sides=4)], ""


def _prism(looks: Looks, rng: Random) -> Shape:
    sides = rng.choice((3, 5, 6))
    return [column((0, 0), 0.6, (0, rng.uniform(0.5, 1.4)), looks.body, sides=sides)], (
        f"with {_NUMBERS[sides]} sides"
    )


def _ball(looks: Looks, rng: Random) -> Shape:
    return _globe(0.6, 0, looks.body), ""


def _tower(looks: Looks, rng: Random) -> Shape:
    floors = rng.randint(2, 6)
    solids = [
        box((-0.4, 0.4), (-0.4, 0.4), (0.5 * i, 0.5 * i + 0.5), (looks.body, looks.second)[i % 2])
        for i in range(floors)
    ]
    return solids, f"of {_NUMBERS[floors]} blocks"


def _row(looks: Looks, rng: Random) -> Shape:
    count = rng.randint(2, 6)
    solids = [box((i, i + 0.7), (-0.35, 0.35), (0, 0.7), looks.body) for i in range(count)]
    return solids, f"of {_NUMBERS[count]} cubes"


def _striped(looks: Looks, rng: Random) -> Shape:
    count, high = rng.randint(2, 6), rng.uniform(1.2, 1.8)
    step = high / count
    solids = [box((-0.6, 0.6), (-0.5, 0.5), (0, high), looks.body)]
    solids += [
        box((-0.6, 0.6), (-0.52, -0.5), (step * (i + 0.25), step * (i + 0.7)), looks.second)
        for i in range(count)
    ]
    return solids, f"with {_NUMBERS[count]} stripes"


def _slotted(looks: Looks, rng: Random) -> Shape:
    count = rng.randint(2, 6)
    wide = 0.5 * count
    dark = Paint((30, 28, 28))
    solids = [box((0, wide), (-0.4, 0.4), (0, 1), looks.body)]
    solids += [
        box((0.5 * i + 0.1, 0.5 * i + 0.4), (-0.42, -0.4), (0.15, 0.85), dark) for i in range(count)
    ]
    return solids, f"with {_NUMBERS[count]} holes"


def _walker(looks: Looks, rng: Random) -> Shape:
    """A ball on legs: legs are learnt here, seats and table tops are not."""
    count = rng.choice((3, 4))
    feet = [
        (
            0.4 * math.cos(2 * math.pi * i / count + 0.6),
            0.4 * math.sin(2 * math.pi * i / count + 0.6),
        )
        for i in range(count)
    ]
    legs = [column(foot, 0.07, (0, 0.9), looks.second, sides=4) for foot in feet]
    return [*legs, *_globe(0.6, 0.7, looks.body)], f"on {_NUMBERS[count]} legs"


def _arch(looks: Looks, rng: Random) -> Shape:
    posts = [box((x, x + 0.4), (-0.3, 0.3), (0, 1.4), looks.body) for x in (-0.9, 0.5)]
    return [*posts, box((-1, 1), (-0.3, 0.3), (1.4, 1.8), looks.body)], ""


def _stairs(looks: Looks, rng: Random) -> Shape:
    count = rng.randint(2, 5)
    solids = [
        box((0.4 * i, 0.4 * i + 0.4), (-0.5, 0.5), (0, 0.35 * (i + 1)), looks.body)
        for i in range(count)
    ]
    return solids, f"with {_NUMBERS[count]} steps"


def _cross(looks: Looks, rng: Random) -> Shape:
    beam = box((-0.7, 0.7), (-0.2, 0.2), (0.9, 1.3), looks.body)
    return [box((-0.2, 0.2), (-0.2, 0.2), (0, 1.8), looks.body), beam], ""


def _letter(looks: Looks, rng: Random) -> Shape:
    letter = rng.choice("LUT")
    post, foot = (-0.8, -0.4), (0.0, 0.4)
    base = box((-0.8, 0.8), (-0.3, 0.3), foot, looks.body)
    if letter == "T":
        bar = box((-0.8, 0.8), (-0.3, 0.3), (1.4, 1.8), looks.body)
        return [box((-0.2, 0.2), (-0.3, 0.3), (0, 1.4), looks.body), bar], "shaped like a T"
    solids = [base, box(post, (-0.3, 0.3), (0.4, 1.7), looks.body)]
    if letter == "U":
        solids.append(box((0.4, 0.8), (-0.3, 0.3), (0.4, 1.7), looks.body))
    return solids, f"shaped like a {letter}"


def _house(looks: Looks, rng: Random) -> Shape:
    walls = box((-0.6, 0.6), (-0.6, 0.6), (0, 0.9), looks.body)
    roof = column((0, 0), 1.0, (0.9, 1.6), looks.second, 0.05, sides=4)
    return [walls, roof], "with a pointed roof"


def _tree(looks: Looks, rng: Random) -> Shape:
    trunk = column((0, 0), 0.13, (0, 0.8), Paint((110, 74, 46), "wood"), sides=6)
    if rng.random() < 0.5:
        return [trunk, column((0, 0), 0.6, (0.6, 2.0), looks.body, 0.05)], "with a pointed crown"
    return [trunk, *_globe(0.6, 0.7, looks.body)], "with a round crown"


def _bottle(looks: Looks, rng: Random) -> Shape:
    return _lathe([(0, 0.4), (1.1, 0.4), (1.4, 0.14), (1.9, 0.14)], looks.body), ""


def _bucket(looks: Looks, rng: Random) -> Shape:
    inside = column((0, 0), 0.55, (0.95, 1.0), Paint(shade(looks.body.colour, 0.5)), 0.95)
    return [*_lathe([(0, 0.4), (1.0, 0.6)], looks.body), inside], ""


def _vase(looks: Looks, rng: Random) -> Shape:
    return _lathe([(0, 0.3), (0.5, 0.6), (1.1, 0.25), (1.4, 0.4)], looks.body), ""


def _mushroom(looks: Looks, rng: Random) -> Shape:
    cap = _lathe([(0.6, 0.8), (0.85, 0.7), (1.2, 0.15)], looks.body)
    return [*_lathe([(0, 0.3), (0.6, 0.2)], looks.second), *cap], ""


def _snowman(looks: Looks, rng: Random) -> Shape:
    return [*_globe(0.6, 0, looks.body), *_globe(0.4, 1.05, looks.body)], "made of two balls"


def _gift(looks: Looks, rng: Random) -> Shape:
    body = box((-0.6, 0.6), (-0.6, 0.6), (0, 1.0), looks.body)
    front = box((-0.12, 0.12), (-0.62, -0.6), (0, 1.0), looks.second)
    return [body, front, box((-0.12, 0.12), (-0.62, 0.62), (1.0, 1.03), looks.second)], (
        "with a ribbon"
    )


def _car(looks: Looks, rng: Random) -> Shape:
    body = box((-1.1, 1.1), (-0.45, 0.45), (0.2, 0.65), looks.body)
    cabin = box((-0.6, 0.5), (-0.4, 0.4), (0.65, 1.1), looks.second)
    dark = Paint((30, 30, 32))
    wheels = [box((x, x + 0.4), (-0.5, 0.5), (0, 0.4), dark) for x in (-0.9, 0.5)]
    return [*wheels, body, cabin], ""


def _books(looks: Looks, rng: Random) -> Shape:
    count = rng.randint(2, 6)
    solids = []
    for i in range(count):
        shift, paint = rng.uniform(-0.12, 0.12), (looks.body, looks.second)[i % 2]
        solids.append(
            box((-0.8 + shift, 0.8 + shift), (-0.55, 0.55), (0.25 * i, 0.25 * i + 0.23), paint)
        )
    return solids, f"of {_NUMBERS[count]} books"


def _fence(looks: Looks, rng: Random) -> Shape:
    count = rng.randint(3, 6)
    posts = [
        box((0.5 * i, 0.5 * i + 0.15), (-0.08, 0.08), (0, 1.2), looks.body) for i in range(count)
    ]
    rail = box((0, 0.5 * count - 0.35), (0.08, 0.14), (0.8, 0.95), looks.second)
    return [*posts, rail], f"with {_NUMBERS[count]} posts"


SHAPES: dict[str, Callable[[Looks, Random], Shape]] = {
    "cube": _cube, "block": _block, "cylinder": _cylinder, "cone": _cone, "pyramid": _pyramid,
    "prism": _prism, "ball": _ball, "tower": _tower, "row": _row, "striped block": _striped,
    "hollow block": _slotted, "round robot": _walker, "arch": _arch, "stairs": _stairs,
    "cross": _cross, "letter": _letter, "house": _house, "tree": _tree, "bottle": _bottle,
    "bucket": _bucket, "vase": _vase, "mushroom": _mushroom, "snowman": _snowman,
    "gift": _gift, "car": _car, "stack": _books, "fence": _fence,
}  # fmt: skip
