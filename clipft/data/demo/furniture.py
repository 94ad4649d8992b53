"""The kinds of furniture in the demo's catalogue, each built from simple solids."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from clipft.data.demo.drawing import Paint, Solid, box, column


@dataclass(frozen=True)
class Paints:
    """The paints of a product's main part, of its legs or frame, and of its second tone."""

    body: Paint
    frame: Paint
    accent: Paint


Built = tuple[list[Solid], str]
"""The solids, and a description of this piece's details, such as "with three drawers"."""


@dataclass(frozen=True)
class Kind:
    """A kind of furniture: its names and possible materials, and the function that builds one."""

    category: str
    names: tuple[str, ...]
    materials: tuple[str, ...]
    build: Callable[[Paints, Random], Built]


_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def _legs(
    half_x: float, half_y: float, height: float, paint: Paint, thick: float = 0.05
) -> list[Solid]:
    return [
        box((x - thick, x + thick), (y - thick, y + thick), (0, height), paint)
        for x in (-half_x + thick, half_x - thick)
        for y in (-half_y + thick, half_y - thick)
    ]


def _chair(paints: Paints, rng: Random) -> Built:
    seat = box((-0.45, 0.45), (-0.42, 0.42), (0.85, 0.98), paints.body)
    solids = [*_legs(0.43, 0.4, 0.85, paints.frame), seat]
    bars = rng.choice((0, 3))
    if not bars:
        back = box((-0.45, 0.45), (0.32, 0.42), (1.1, 2.0), paints.body)
        return [*solids, back], "with a solid back"
    posts = [
        box((x - 0.05, x + 0.05), (0.32, 0.42), (0.98, 1.9), paints.frame) for x in (-0.4, 0, 0.4)
    ]
    rail = box((-0.45, 0.45), (0.32, 0.42), (1.9, 2.05), paints.body)
    return [*solids, *posts, rail], "with a slatted back"


def _sofa(paints: Paints, rng: Random) -> Built:
    seats = rng.choice((2, 3))
    solids, detail = _seating(0.35 + 0.5 * seats, seats, paints, rng)
    return solids, f"for {_NUMBERS[seats]} {detail}"


def _seating(half: float, seats: int, paints: Paints, rng: Random) -> Built:
    """An armchair or a sofa, ``half`` as wide to each side of its middle."""
    wide = 2 * (half - 0.2) / seats
    lefts = [-half + 0.2 + i * wide for i in range(seats)]
    solids = _legs(half, 0.5, 0.2, paints.frame, 0.07)
    solids.append(box((-half, half), (-0.5, 0.5), (0.2, 0.5), paints.body))
    solids += [
        box((x + 0.02, x + wide - 0.02), (-0.52, 0.3), (0.5, 0.68), paints.body) for x in lefts
    ]
    solids.append(box((-half, half), (0.3, 0.55), (0.5, 1.35), paints.body))
    solids += [box((x, x + 0.2), (-0.5, 0.3), (0.5, 0.9), paints.body) for x in (-half, half - 0.2)]
    if rng.random() < 0.5:
        solids.append(
            box((lefts[0] + 0.1, lefts[0] + 0.55), (0.1, 0.25), (0.68, 1.1), paints.accent)
        )
        return solids, "with a cushion" if seats == 1 else "people with a cushion"
    return solids, "with padded arms" if seats == 1 else "people"


def _stool(paints: Paints, rng: Random) -> Built:
    tall = rng.choice((0.8, 1.7))
    seat = column((0, 0), 0.5, (tall, tall + 0.15), paints.body)
    solids = [*_legs(0.38, 0.38, tall, paints.frame), seat]
    return solids, "for a bar" if tall > 1 else "with a low round seat"


def _bench(paints: Paints, rng: Random) -> Built:
    seat = box((-1.3, 1.3), (-0.35, 0.35), (0.75, 0.9), paints.body)
    solids = [*_legs(1.2, 0.33, 0.75, paints.frame, 0.08), seat]
    if rng.random() < 0.5:
        shelf = box((-1.1, 1.1), (-0.3, 0.3), (0.25, 0.32), paints.frame)
        return [*solids, shelf], "with a shoe shelf"
    return solids, "without a back"


def _table(paints: Paints, rng: Random) -> Built:
    if rng.random() < 0.5:
        foot = column((0, 0), 0.5, (0, 0.1), paints.frame)
        post = column((0, 0), 0.12, (0.1, 1.1), paints.frame, sides=8)
        top = column((0, 0), 1.0, (1.1, 1.22), paints.body, sides=16)
        return [foot, post, top], "with a round top"
    top = box((-1.3, 1.3), (-0.7, 0.7), (1.1, 1.22), paints.body)
    return [*_legs(1.2, 0.65, 1.1, paints.frame, 0.07), top], "with a rectangular top"


def _desk(paints: Paints, rng: Random) -> Built:
    drawers = rng.choice((2, 3, 4))
    solids = [box((-1.2, 1.2), (-0.55, 0.55), (1.1, 1.2), paints.body)]
    solids.append(box((0.5, 1.15), (-0.5, 0.5), (0.1, 1.1), paints.body))
    solids += _fronts(0.5, 1.15, -0.5, (0.15, 1.08), drawers, paints.accent)
    solids += _legs(1.15, 0.5, 1.1, paints.frame)[:2]
    return solids, f"with {_NUMBERS[drawers]} drawers"


def _fronts(
    left: float, right: float, front: float, z: tuple[float, float], rows: int, paint: Paint
) -> list[Solid]:
    high = (z[1] - z[0]) / rows
    return [
        box(
            (left + 0.06, right - 0.06),
            (front - 0.03, front),
            (z[0] + i * high + 0.04, z[0] + (i + 1) * high - 0.04),
            paint,
        )
        for i in range(rows)
    ]


def _chest(paints: Paints, rng: Random) -> Built:
    rows = rng.randint(2, 6)
    high = 0.6 + 0.25 * rows
    solids = _legs(0.7, 0.4, 0.15, paints.frame, 0.07)
    solids.append(box((-0.7, 0.7), (-0.4, 0.4), (0.15, high), paints.body))
    return solids + _fronts(-0.7, 0.7, -0.4, (0.18, high), rows, paints.accent), (
        f"with {_NUMBERS[rows]} drawers"
    )


def _doored(high: float, choices: Sequence[int], paints: Paints, rng: Random) -> Built:
    """A cabinet or a wardrobe, with one of ``choices`` as its number of doors."""
    doors = rng.choice(choices)
    half = 0.3 + 0.25 * doors
    solids = _legs(half, 0.4, 0.2, paints.frame, 0.07)
    solids.append(box((-half, half), (-0.4, 0.4), (0.2, high), paints.body))
    wide = 2 * half / doors
    for i in range(doors):
        left = -half + i * wide
        solids += _fronts(left, left + wide, -0.4, (0.22, high), 1, paints.accent)
        knob = (left + wide * (0.8 if i % 2 == 0 else 0.2), -0.46)
        solids.append(column(knob, 0.05, (high * 0.5, high * 0.5 + 0.12), paints.frame, sides=4))
    return solids, f"with {_NUMBERS[doors]} {'door' if doors == 1 else 'doors'}"


def _bookcase(paints: Paints, rng: Random) -> Built:
    shelves = rng.randint(2, 6)
    high = 0.5 * shelves + 0.1
    sides = [box((x, x + 0.08), (-0.3, 0.3), (0, high), paints.body) for x in (-0.7, 0.62)]
    boards = [
        box((-0.62, 0.62), (-0.3, 0.3), (z, z + 0.07), paints.body)
        for z in (0.5 * i for i in range(shelves + 1))
    ]
    rows = [
        box(
            (-0.55, rng.uniform(-0.2, 0.5)),
            (-0.1, 0.2),
            (0.5 * i + 0.07, 0.5 * i + 0.38),
            paints.accent,
        )
        for i in range(shelves)
        if rng.random() < 0.6
    ]
    return [*sides, *boards, *rows], f"with {_NUMBERS[shelves]} shelves"


def _bed(paints: Paints, rng: Random) -> Built:
    half = rng.choice((0.55, 1.0))
    head = box((-half, half), (1.2, 1.32), (0, 1.2), paints.body)
    base = box((-half, half), (-1.2, 1.2), (0.15, 0.4), paints.body)
    cover = box((-half + 0.03, half - 0.03), (-1.2, 0.6), (0.4, 0.62), paints.accent)
    white = Paint((240, 240, 240), "fabric")
    pillow = box((-half + 0.1, half - 0.1), (0.65, 1.15), (0.4, 0.66), white)
    solids = [*_legs(half, 1.2, 0.15, paints.frame, 0.07), base, cover, pillow, head]
    return solids, "for one person" if half < 0.6 else "for two people"


def _lamp(paints: Paints, rng: Random) -> Built:
    high = rng.choice((0.9, 2.2))
    foot = column((0, 0), 0.4, (0, 0.1), paints.frame)
    post = column((0, 0), 0.06, (0.1, high), paints.frame, sides=6)
    taper = rng.choice((0.5, 1.0))
    lampshade = column((0, 0), 0.55, (high, high + 0.65), paints.body, taper)
    shape = "cone" if taper < 1 else "drum"
    stem = "tall" if high > 1 else "short"
    return [foot, post, lampshade], f"with a {shape} shade on a {stem} stem"


_HARD = ("wood", "metal", "plastic", "rattan", "marble")
_SOFT = ("fabric", "leather", "velvet", "rattan")
KINDS = (
    Kind("seating", ("chair", "dining chair"), (*_SOFT, "wood", "metal", "plastic"), _chair),
    Kind("seating", ("armchair", "easy chair"), _SOFT, partial(_seating, 0.75, 1)),
    Kind("seating", ("stool",), (*_SOFT, "wood", "metal", "plastic"), _stool),
    Kind("seating", ("bench",), ("wood", "leather", "rattan", "metal", "fabric"), _bench),
    Kind("seating", ("sofa", "couch"), _SOFT, _sofa),
    Kind("tables", ("table",), _HARD, _table),
    Kind("tables", ("desk", "writing desk"), ("wood", "metal", "plastic"), _desk),
    Kind("storage", ("chest of drawers", "dresser"), _HARD, _chest),
    Kind("storage", ("cabinet", "sideboard"), _HARD, partial(_doored, 1.2, (1, 2, 3, 4))),
    Kind(
        "storage",
        ("wardrobe",),
        ("wood", "metal", "plastic", "rattan"),
        partial(_doored, 2.6, (2, 3)),
    ),
    Kind("storage", ("bookcase", "shelving unit"), ("wood", "metal", "plastic"), _bookcase),
    Kind("beds", ("bed",), ("wood", "metal", "leather", "fabric", "velvet"), _bed),
    Kind("lighting", ("lamp",), ("fabric", "metal", "plastic", "rattan"), _lamp),
)
