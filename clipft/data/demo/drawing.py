"""A small drawing kit: solids seen from any side, textured materials, rooms and clutter."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Color = tuple[int, int, int]
Point = tuple[float, float]

SIZE = 128
"""Width and height of a canvas, in pixels."""

COLORS: dict[str, Color] = {
    "red": (200, 38, 38),
    "orange": (238, 128, 30),
    "yellow": (240, 205, 50),
    "green": (52, 140, 62),
    "turquoise": (52, 190, 185),
    "blue": (42, 84, 190),
    "purple": (125, 62, 160),
    "pink": (238, 140, 175),
    "brown": (118, 74, 42),
    "beige": (216, 192, 152),
    "black": (40, 40, 44),
    "white": (243, 243, 240),
    "grey": (138, 140, 144),
}

WALLS: dict[str, Color] = {
    "white": (240, 240, 238),
    "cream": (240, 228, 198),
    "grey": (176, 178, 182),
    "pale blue": (182, 208, 232),
    "pale green": (192, 220, 188),
    "pale pink": (238, 204, 208),
    "dark grey": (86, 88, 96),
    "pale yellow": (244, 232, 160),
}

FLOORS: dict[str, tuple[Color, str]] = {
    "wooden floor": ((176, 128, 84), "wood"),
    "grey floor": ((150, 150, 150), "plain"),
    "dark floor": ((84, 66, 56), "wood"),
    "marble floor": ((214, 212, 208), "marble"),
}

MATERIALS = ("wood", "fabric", "metal", "leather", "rattan", "marble", "velvet", "plastic")


@dataclass(frozen=True)
class Paint:
    """The color and material of a face; ``material`` is one of MATERIALS or ``plain``."""

    color: Color
    material: str = "plain"


@dataclass(frozen=True)
class Solid:
    """An upright prism over a convex outline, counter-clockwise, in x (right) and y (away)."""

    outline: tuple[Point, ...]
    bottom: float
    top: float
    paint: Paint
    taper: float = 1.0
    """Width of the top as a multiple of the bottom's."""


@dataclass(frozen=True)
class View:
    """A camera without perspective: degrees around the upright axis, and above the horizon."""

    yaw: float
    pitch: float


class Canvas:
    """An RGB image, and for each of its pixels the material that it shows."""

    def __init__(self, background: Color) -> None:
        self.image = Image.new("RGB", (SIZE, SIZE), background)
        self._materials = Image.new("L", (SIZE, SIZE), 0)
        self._pen = ImageDraw.Draw(self.image)
        self._material_pen = ImageDraw.Draw(self._materials)

    def polygon(self, points: Sequence[Point], paint: Paint) -> None:
        self._pen.polygon(points, fill=paint.color)
        self._material_pen.polygon(points, fill=_TEXTURE_IDS[paint.material])

    def rectangle(self, box: tuple[float, float, float, float], paint: Paint) -> None:
        self._pen.rectangle(box, fill=paint.color)
        self._material_pen.rectangle(box, fill=_TEXTURE_IDS[paint.material])

    def ellipse(self, box: tuple[float, float, float, float], paint: Paint) -> None:
        self._pen.ellipse(box, fill=paint.color)
        self._material_pen.ellipse(box, fill=_TEXTURE_IDS[paint.material])

    def finish(self, rng: Random) -> Image.Image:
        """Return the image with the texture of each material, shifted at random."""
        rows = (np.arange(SIZE) + rng.randrange(SIZE))[:, None] % SIZE
        columns = (np.arange(SIZE) + rng.randrange(SIZE))[None, :] % SIZE
        gain = _textures()[np.asarray(self._materials), rows, columns]
        shown = np.asarray(self.image) * gain[:, :, None] * rng.uniform(0.92, 1.06)
        return Image.fromarray(np.clip(shown, 0, 255).astype(np.uint8))


def box(
    x: tuple[float, float], y: tuple[float, float], z: tuple[float, float], paint: Paint
) -> Solid:
    """Make a cuboid between two values on each axis."""
    outline = ((x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1]))
    return Solid(outline, z[0], z[1], paint)


def column(
    centre: Point,
    radius: float,
    z: tuple[float, float],
    paint: Paint,
    taper: float = 1.0,
    sides: int = 12,
) -> Solid:
    """Make a cylinder or, by ``sides`` and ``taper``, a prism, a cone or a pyramid."""
    turns = (2 * math.pi * (i + 0.5) / sides for i in range(sides))
    outline = ((centre[0] + radius * math.cos(t), centre[1] + radius * math.sin(t)) for t in turns)
    return Solid(tuple(outline), z[0], z[1], paint, taper)


def draw_solids(
    canvas: Canvas, solids: Sequence[Solid], view: View, frame: tuple[float, float, float, float]
) -> None:
    """Draw solids as large as fits ``frame`` (left, top, right, bottom), resting on its bottom."""
    faces = [face for solid in solids for face in _visible_faces(solid, view)]
    xs = [x for _, points, _ in faces for x, _ in points]
    ys = [y for _, points, _ in faces for _, y in points]
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    scale = min((frame[2] - frame[0]) / width, (frame[3] - frame[1]) / height)
    left = (frame[0] + frame[2] - width * scale) / 2 - min(xs) * scale
    top = frame[3] - max(ys) * scale
    # Painter's algorithm: from the farthest face to the nearest
    for _, points, paint in sorted(faces, key=lambda face: -face[0]):
        canvas.polygon([(left + x * scale, top + y * scale) for x, y in points], paint)


def shade(color: Color, gain: float) -> Color:
    red, green, blue = (min(255, int(part * gain)) for part in color)
    return red, green, blue


def vary(color: Color, rng: Random, amount: int = 12) -> Color:
    """Return a color near the given one, so that no name means one exact value."""
    red, green, blue = (min(255, max(0, part + rng.randint(-amount, amount))) for part in color)
    return red, green, blue


def draw_room(canvas: Canvas, wall: Color, floor: Paint, horizon: float) -> None:
    """Draw a wall above ``horizon`` (pixels from the top) and a floor below it."""
    canvas.rectangle((0, 0, SIZE, horizon), Paint(wall))
    canvas.rectangle((0, horizon, SIZE, SIZE), floor)
    canvas.rectangle((0, horizon - 2, SIZE, horizon), Paint(shade(wall, 0.85)))


def _visible_faces(solid: Solid, view: View) -> list[tuple[float, list[Point], Paint]]:
    """List (depth, points on the screen, shaded paint) of each face turned to the camera."""
    yaw, pitch = math.radians(view.yaw), math.radians(view.pitch)
    cos_yaw, sin_yaw = math.cos(yaw), math.sin(yaw)
    cos_pitch, sin_pitch = math.cos(pitch), math.sin(pitch)
    turned = [(x * cos_yaw - y * sin_yaw, x * sin_yaw + y * cos_yaw) for x, y in solid.outline]
    middle_x = sum(x for x, _ in turned) / len(turned)
    middle_y = sum(y for _, y in turned) / len(turned)
    small = [
        (middle_x + (x - middle_x) * solid.taper, middle_y + (y - middle_y) * solid.taper)
        for x, y in turned
    ]
    low = [(x, -solid.bottom * cos_pitch - y * sin_pitch) for x, y in turned]
    high = [(x, -solid.top * cos_pitch - y * sin_pitch) for x, y in small]
    paint, centre = solid.paint, (solid.bottom + solid.top) / 2
    top = Paint(shade(paint.color, 1.08), paint.material)
    faces = [(middle_y * cos_pitch - solid.top * sin_pitch, high, top)]
    for i, (x0, y0) in enumerate(turned):
        j = (i + 1) % len(turned)
        x1, y1 = turned[j]
        if x1 <= x0 + 1e-9:  # turned away from the camera
            continue
        depth = (y0 + y1) / 2 * cos_pitch - centre * sin_pitch
        slope = (y1 - y0) / math.hypot(x1 - x0, y1 - y0)
        side = Paint(shade(paint.color, 0.8 - 0.22 * slope), paint.material)
        faces.append((depth, [low[i], low[j], high[j], high[i]], side))
    return faces


Grid = NDArray[np.float32]


def _wave(period: float, axis: int, shift: Any = 0.0) -> Any:
    at = np.indices((SIZE, SIZE))[axis]
    return np.sin(2 * math.pi * (at + shift) / period)


def _blotches(cells: int, generator: np.random.Generator) -> Any:
    """Smooth noise between -1 and 1."""
    coarse = Image.fromarray(generator.integers(0, 256, (cells, cells)).astype(np.uint8))
    return np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) / 127.5 - 1


@cache
def _textures() -> Grid:
    """Brightness factors around 1, [materials, SIZE, SIZE] float32, ordered as _TEXTURE_IDS."""
    generator = np.random.default_rng(7)
    rows, columns = np.indices((SIZE, SIZE))
    speckle = generator.normal(0, 1, (SIZE, SIZE))
    fine, coarse = _blotches(40, generator), _blotches(9, generator)
    lattice = np.abs(_wave(32, 0, columns)) * np.abs(_wave(32, 0, -columns))
    patterns = {
        "plain": np.ones((SIZE, SIZE)),
        "wood": 1 + 0.16 * _wave(9, 0, 7 * _blotches(5, generator)) + 0.05 * fine,
        "fabric": 1 + 0.16 * _wave(4, 0) * _wave(4, 1) + 0.10 * speckle,
        "metal": 1.05 + 0.40 * _wave(26, 1, rows * 0.4),
        "leather": 0.72 + 0.42 * np.sqrt(lattice),
        "rattan": 1 + 0.30 * np.where((rows // 8 + columns // 8) % 2, _wave(4, 0), _wave(4, 1)),
        "marble": 1.06 - 0.45 * np.exp(-((coarse + 0.5 * fine) ** 2) * 60),
        "velvet": 0.92 + 0.26 * coarse,
        "plastic": 1 + 0.35 * (np.abs((rows + columns) % SIZE - 40) < 9),
    }
    return np.stack([patterns[name] for name in _TEXTURE_IDS]).astype(np.float32)


_TEXTURE_IDS = {name: index for index, name in enumerate(("plain", *MATERIALS))}


def draw_plant(canvas: Canvas, x: float, ground: float, color: Color, rng: Random) -> None:
    """Draw a plant in a pot of that color."""
    leaf = vary((46, 122, 52), rng)
    for _ in range(8):
        dx, dy = rng.uniform(-12, 12), rng.uniform(16, 40)
        tip = (x + dx, ground - dy)
        canvas.polygon([(x - 2, ground - 12), tip, (x + 3, ground - 12)], Paint(leaf))
        canvas.ellipse((tip[0] - 4, tip[1] - 4, tip[0] + 4, tip[1] + 6), Paint(shade(leaf, 0.9)))
    pot = [(x - 9, ground - 15), (x + 9, ground - 15), (x + 6, ground), (x - 6, ground)]
    canvas.polygon(pot, Paint(color))


def draw_rug(canvas: Canvas, x: float, ground: float, color: Color, rng: Random) -> None:
    half = rng.uniform(44, 56)
    canvas.ellipse((x - half, ground - 14, x + half, ground + 8), Paint(color, "fabric"))
    canvas.ellipse((x - half + 8, ground - 10, x + half - 8, ground + 4), Paint(shade(color, 1.2)))


def draw_window(canvas: Canvas, x: float, ground: float, color: Color, rng: Random) -> None:
    """Draw a window on the wall, with a frame of that color."""
    left, top, right, bottom = x - 15, 6, x + 15, 6 + rng.uniform(34, 42)
    canvas.rectangle((left - 3, top - 3, right + 3, bottom + 3), Paint(color))
    canvas.rectangle((left, top, right, bottom), Paint((150, 200, 245)))
    canvas.rectangle((x - 1, top, x + 1, bottom), Paint(color))
    middle = (top + bottom) / 2
    canvas.rectangle((left, middle - 1, right, middle + 1), Paint(color))


def draw_picture(canvas: Canvas, x: float, ground: float, color: Color, rng: Random) -> None:
    """Draw a framed picture of that color on the wall."""
    top, half = rng.uniform(6, 14), rng.uniform(11, 15)
    canvas.rectangle((x - half, top, x + half, top + 2 * half), Paint((58, 44, 36)))
    canvas.rectangle((x - half + 3, top + 3, x + half - 3, top + 2 * half - 3), Paint(color))


def draw_curtain(canvas: Canvas, x: float, ground: float, color: Color, rng: Random) -> None:
    left = 0 if x < SIZE / 2 else SIZE - 20
    for i in range(5):
        tone = shade(color, 1.1 if i % 2 else 0.85)
        canvas.rectangle((left + 4 * i, 0, left + 4 * i + 4, ground - 8), Paint(tone))


def draw_ball(canvas: Canvas, x: float, ground: float, color: Color, rng: Random) -> None:
    radius = rng.uniform(8, 12)
    canvas.ellipse((x - radius, ground - 2 * radius, x + radius, ground), Paint(color))
    spot = (x - radius * 0.5, ground - 1.7 * radius, x, ground - 1.2 * radius)
    canvas.ellipse(spot, Paint(shade(color, 1.5)))


def draw_box(canvas: Canvas, x: float, ground: float, color: Color, rng: Random) -> None:
    half, height = rng.uniform(8, 11), rng.uniform(14, 20)
    canvas.rectangle((x - half, ground - height, x + half, ground), Paint(color))
    canvas.rectangle(
        (x - half, ground - height, x + half, ground - height + 4), Paint(shade(color, 0.75))
    )


Draw = Callable[[Canvas, float, float, Color, Random], None]

CLUTTER: dict[str, Draw] = {
    "rug": draw_rug,
    "window": draw_window,
    "picture": draw_picture,
    "curtain": draw_curtain,
    "plant": draw_plant,
    "ball": draw_ball,
    "box": draw_box,
}
"""What may be around a product, from the back to the front: the order in which it is drawn."""
