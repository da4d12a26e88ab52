"""A small procedural world of moving shapes: captioned clips for models that are trained in minutes, without any files.

Clip `index` is one shape of a named colour, tone, size and texture that moves in a straight line, or stays still, over
a softly textured background; its caption is one of several phrasings. All random choices come from the raw output of
Philox, which NumPy fixes for all versions and platforms. More objects, turns and a moving camera are to come.
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
TONES = {"vivid": 0.0, "muted": 0.5}  # how far the colour is mixed with mid grey; captions name the muted tone only
BACKGROUNDS = {
    "grey": (0.50, 0.50, 0.52),
    "sky-blue": (0.55, 0.78, 0.92),
    "sandy": (0.86, 0.78, 0.62),
    "mossy": (0.36, 0.44, 0.30),
    "dark": (0.16, 0.15, 0.20),
}
SHAPES = ("circle", "square", "triangle")
TEXTURES = ("plain", "plain", "plain", "plain", "striped", "checkered")  # most shapes are plain
SIZES = {"small": 0.13, "medium": 0.19, "large": 0.26}  # half the width, as a share of the picture's shorter side
SPEEDS = {"slowly": 0.25, "quickly": 0.6}  # way over the whole clip, as a share of the picture's shorter side
STILL = "nowhere"
DIRECTIONS = {  # (down, right)
    "to the right": (0.0, 1.0),
    "to the left": (0.0, -1.0),
    "upwards": (-1.0, 0.0),
    "downwards": (1.0, 0.0),
    "diagonally up to the right": (-0.7071, 0.7071),
    "diagonally up to the left": (-0.7071, -0.7071),
    "diagonally down to the right": (0.7071, 0.7071),
    "diagonally down to the left": (0.7071, -0.7071),
    STILL: (0.0, 0.0),
}
PHRASINGS = (
    "A {size} {look} {shape} {moves} across a {background} background.",
    "On a {background} background, a {size} {look} {shape} {moves}.",
    "The video shows a {size} {look} {shape} that {moves}; the background is {background}.",
    "One {look} {shape} of {size} size {moves}; everything behind it is {background}.",
)
STREAM = 0x5A9E5  # sets these draws apart from others that are seeded by an index

_WAVES = 3  # of the background's texture
_WAVE_HEIGHT = 0.05  # of each of them, as a share of the background's brightness


@dataclass(frozen=True)
class Scene:
    """What happens in one clip; the words are keys of the tables above."""

    shape: str
    colour: str
    tone: str
    texture: str
    size: str
    background: str
    direction: str
    speed: str
    phrasing: str
    offset: tuple[float, float]  # of the middle of the way from the picture's centre, as a share of the shorter side
    waves: tuple[tuple[float, float, float], ...]  # (down, right, phase) of the background's texture, in periods

    @property
    def caption(self) -> str:
        """The scene in one sentence."""
        texture = "" if self.texture == "plain" else f"{self.texture} "
        tone = "" if self.tone == "vivid" else f"{self.tone} "
        moves = "stays still" if self.direction == STILL else f"moves {self.speed} {self.direction}"
        return self.phrasing.format(
            size=self.size,
            look=f"{texture}{tone}{self.colour}",
            shape=self.shape,
            moves=moves,
            background=self.background,
        ).replace("still across", "still on")

    @property
    def rgb(self) -> tuple[float, float, float]:
        """The surface's colour, each channel in 0..1."""
        share = TONES[self.tone]
        return tuple((1 - share) * channel + share * 0.5 for channel in COLOURS[self.colour])


def scene(index: int) -> Scene:
    """Return scene number `index` (any whole number from 0 on)."""
    raw = np.random.Philox(np.random.SeedSequence([STREAM, index])).random_raw(11 + 3 * _WAVES)
    uniform = iter(((raw >> np.uint64(11)) * 2.0**-53).tolist())

    def pick(words) -> str:
        return list(words)[int(next(uniform) * len(words))]

    def between(low: float, high: float) -> float:
        return low + (high - low) * next(uniform)

    return Scene(
        shape=pick(SHAPES),
        colour=pick(COLOURS),
        tone=pick(TONES),
        texture=pick(TEXTURES),
        size=pick(SIZES),
        background=pick(BACKGROUNDS),
        direction=pick(DIRECTIONS),
        speed=pick(SPEEDS),
        phrasing=pick(PHRASINGS),
        offset=(between(-0.15, 0.15), between(-0.15, 0.15)),
        waves=tuple((between(-2.5, 2.5), between(-2.5, 2.5), between(0, 1)) for _ in range(_WAVES)),
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
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    behind = background(content, height=height, width=width)
    video = np.empty((frames, height, width, 3), np.float32)
    for i, centre in enumerate(centres(content, frames)):
        down = (y - (height - 1) / 2) / short - centre[0]
        right = (x - (width - 1) / 2) / short - centre[1]
        outside = _distance(content.shape, down, right, SIZES[content.size])
        cover = np.clip(0.5 - outside * short, 0.0, 1.0)[..., None]  # anti-aliased over one pixel
        shade = _texture(content.texture, down, right, SIZES[content.size])[..., None]
        picture = cover * shade * np.asarray(content.rgb, np.float32) + (1.0 - cover) * behind
        video[i] = 2.0 * np.clip(picture, 0.0, 1.0) - 1.0
    return video, content.caption


def centres(content: Scene, frames: int) -> np.ndarray:
    """Return where the shape's centre is, [frames 2]: (down, right) of the picture's, in shares of the shorter side."""
    way = SPEEDS[content.speed] * np.asarray(DIRECTIONS[content.direction])
    share = np.arange(frames) / max(1, frames - 1) - 0.5
    return np.asarray(content.offset) + way * share[:, None]


def background(content: Scene, *, height: int, width: int) -> np.ndarray:
    """Return the picture without the shape, float32 [height width 3] in 0..1."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    down, right = y / height, x / width
    light = 1.1 - 0.2 * down  # a soft light from the top
    for waves_down, waves_right, phase in content.waves:
        light += _WAVE_HEIGHT * np.sin(2 * np.pi * (waves_down * down + waves_right * right + phase))
    return np.clip(np.asarray(BACKGROUNDS[content.background], np.float32) * light[..., None], 0.0, 1.0)


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
    u, v = np.pi * down / (0.45 * radius), np.pi * right / (0.45 * radius)
    wave = np.sin(v) if texture == "striped" else np.cos(u) * np.cos(v)
    return 0.7 + 0.3 * np.clip(3.0 * wave, -1.0, 1.0)
