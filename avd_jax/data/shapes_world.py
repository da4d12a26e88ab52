"""A small procedural world of moving shapes: captioned clips for smoke runs and tests that need no files.

Clip `index` is one shape of a named colour, size and texture that moves in a straight line over a background. All
random choices come from the raw output of Philox, which NumPy fixes for all versions and platforms.
"""

from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (0.85, 0.12, 0.12),
    "orange": (0.95, 0.55, 0.10),
    "yellow": (0.95, 0.88, 0.20),
    "green": (0.15, 0.65, 0.25),
    "blue": (0.15, 0.30, 0.85),
    "purple": (0.55, 0.20, 0.70),
    "white": (0.95, 0.95, 0.95),
    "pink": (0.95, 0.55, 0.75),
}
BACKGROUNDS = {"grey": (0.50, 0.50, 0.52), "sky-blue": (0.55, 0.78, 0.92), "sandy": (0.80, 0.70, 0.50)}
SHAPES = ("circle", "square", "triangle")
TEXTURES = ("plain", "striped", "checkered")
SIZES = {"small": 0.12, "medium": 0.18, "large": 0.26}  # half the width, as a share of the picture's shorter side
SPEEDS = {"slowly": 0.25, "quickly": 0.6}  # way over the whole clip, as a share of the picture's shorter side
DIRECTIONS = {  # (down, right)
    "to the right": (0.0, 1.0),
    "to the left": (0.0, -1.0),
    "upwards": (-1.0, 0.0),
    "downwards": (1.0, 0.0),
    "diagonally up to the right": (-0.7071, 0.7071),
    "diagonally down to the left": (0.7071, -0.7071),
}
STREAM = 0x5A9E5  # sets these draws apart from others that are seeded by an index


@dataclass(frozen=True)
class Scene:
    """What happens in one clip; the words are keys of the tables above."""

    shape: str
    colour: str
    texture: str
    size: str
    background: str
    direction: str
    speed: str
    offset: tuple[float, float]  # of the middle of the way from the picture's centre, as a share of the shorter side

    @property
    def caption(self) -> str:
        """The scene in one sentence."""
        look = self.colour if self.texture == "plain" else f"{self.texture} {self.colour}"
        movement = f"moves {self.speed} {self.direction}"
        return f"A {self.size} {look} {self.shape} {movement} across a {self.background} background."


def scene(index: int) -> Scene:
    """Return scene number `index` (any whole number from 0 on)."""
    raw = np.random.Philox(np.random.SeedSequence([STREAM, index])).random_raw(9)
    uniform = (raw >> np.uint64(11)) * 2.0**-53

    def pick(draw: int, words) -> str:
        return list(words)[int(uniform[draw] * len(words))]

    return Scene(
        shape=pick(0, SHAPES),
        colour=pick(1, COLOURS),
        texture=pick(2, TEXTURES),
        size=pick(3, SIZES),
        background=pick(4, BACKGROUNDS),
        direction=pick(5, DIRECTIONS),
        speed=pick(6, SPEEDS),
        offset=(0.3 * (uniform[7] - 0.5), 0.3 * (uniform[8] - 0.5)),
    )


def caption(index: int) -> str:
    """Return the caption of clip `index` without drawing it: a stream of prompts."""
    return scene(index).caption


def clip(index: int, *, frames: int, height: int, width: int) -> tuple[np.ndarray, str]:
    """Draw clip `index`: float32 [frames height width 3] in [-1, 1], and its caption.

    The whole way of the shape takes the whole clip, whatever the number of frames.
    """
    content = scene(index)
    short = min(height, width)
    way = SPEEDS[content.speed] * np.asarray(DIRECTIONS[content.direction])
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    # A soft light from the top keeps the background from being constant.
    background = np.asarray(BACKGROUNDS[content.background]) * (1.1 - 0.2 * y / height)[..., None]
    video = np.empty((frames, height, width, 3), np.float32)
    for i in range(frames):
        centre = np.asarray(content.offset) + way * (i / max(1, frames - 1) - 0.5)
        down = (y - (height - 1) / 2) / short - centre[0]
        right = (x - (width - 1) / 2) / short - centre[1]
        outside = _distance(content.shape, down, right, SIZES[content.size])
        cover = np.clip(0.5 - outside * short, 0.0, 1.0)[..., None]  # anti-aliased over one pixel
        shade = _texture(content.texture, down, right, SIZES[content.size])[..., None]
        picture = cover * shade * np.asarray(COLOURS[content.colour]) + (1.0 - cover) * background
        video[i] = 2.0 * np.clip(picture, 0.0, 1.0) - 1.0
    return video, content.caption


def _distance(shape: str, down: np.ndarray, right: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to the outline (exact for the circle, along the nearest side for the others)."""
    if shape == "circle":
        return np.hypot(down, right) - radius
    if shape == "square":
        return np.maximum(np.abs(down), np.abs(right)) - 0.9 * radius
    slope = np.sqrt(0.75)  # an equilateral triangle with its tip up
    return np.maximum(down, slope * np.abs(right) - 0.5 * down) - 0.55 * radius


def _texture(texture: str, down: np.ndarray, right: np.ndarray, radius: float) -> np.ndarray:
    """Brightness of the surface, fixed to the shape; the pattern scales with it."""
    if texture == "plain":
        return np.ones_like(down)
    u, v = np.pi * down / (0.35 * radius), np.pi * right / (0.35 * radius)
    wave = np.sin(v) if texture == "striped" else np.cos(u) * np.cos(v)
    return 0.7 + 0.3 * np.clip(3.0 * wave, -1.0, 1.0)
