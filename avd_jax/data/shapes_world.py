"""A small procedural world of moving shapes: captioned clips for models that are trained in an hour, without any files.

Clip `index` shows one to three textured objects of named shape, colour and size that move, turn, grow, shrink or rest,
cross and hide each other, over a softly textured background behind which the camera may pan. Its caption says so in one
of several phrasings. Directions are those seen in the picture. All random choices come from the raw output of Philox,
which NumPy fixes for all versions and platforms: an index is the same clip everywhere.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (0.88, 0.12, 0.12),
    "orange": (0.96, 0.55, 0.08),
    "yellow": (0.96, 0.90, 0.16),
    "green": (0.14, 0.66, 0.22),
    "blue": (0.14, 0.30, 0.88),
    "purple": (0.58, 0.18, 0.74),
}
OUTLINE_COLOURS = {  # what the outline style draws them in
    "red": (0.10, 0.38, 0.40),
    "orange": (0.12, 0.26, 0.52),
    "yellow": (0.34, 0.16, 0.50),
    "green": (0.58, 0.12, 0.34),
    "blue": (0.55, 0.30, 0.06),
    "purple": (0.22, 0.42, 0.10),
}
TONES = {"vivid": (0.0, 0.15), "muted": (0.4, 0.55)}  # how far a colour is mixed with mid grey; "vivid" goes unsaid
BACKGROUNDS = {
    "grey": (0.50, 0.50, 0.52),
    "sky-blue": (0.55, 0.78, 0.92),
    "sandy": (0.86, 0.78, 0.62),
    "mossy": (0.36, 0.44, 0.30),
    "dark": (0.16, 0.15, 0.20),
}
CONTRAST = 0.3  # least distance in RGB between an object's colour and the background's
SHAPES = ("disc", "bar", "cross")  # differ by whole cells of a VAE, so that a small model can learn them
BAR = (0.4, 1.2)  # half its height and half its length, in half its named width
CROSS = (0.3, 1.2)  # likewise of each of its two arms
TEXTURES = ("plain", "plain", "plain", "striped", "spotted")  # most objects are plain, which goes unsaid
SIZES = {"small": 0.17, "medium": 0.22, "large": 0.28}  # half the width, as a share of the picture's shorter side
SPEEDS = {"slowly": 0.22, "quickly": 0.5}  # way over the whole clip, as a share of the picture's shorter side
DIRECTIONS = {"to the right": (0.0, 1.0), "to the left": (0.0, -1.0), "upwards": (-1.0, 0.0), "downwards": (1.0, 0.0)}
ACTIONS = ("move",) * 6 + ("rest", "turn", "grow", "shrink")
VERBS = {
    "move": ("moves", "glides", "drifts"),
    "rest": ("stays still", "rests"),
    "turn": ("turns in place", "spins in place"),
    "grow": ("grows", "gets larger"),
    "shrink": ("shrinks", "gets smaller"),
}
COUNTS = (1,) * 7 + (2, 2, 3)  # objects in a clip
PANS = ("",) * 8 + ("left", "right")
PHRASINGS = (
    "{Objects} on a {background} background.",
    "On a {background} background, {objects}.",
    "In this video {objects}; the background is {background}.",
    "{Objects}. Everything behind is {background}.",
)
STYLES = ("painted", "outline")
PAPER = (0.95, 0.93, 0.88)  # the outline style's background, tinted by the painted one's
STREAM = 0x5A9E6  # sets these draws apart from others that are seeded by an index

_CLAUSE = re.compile(
    r"(?P<colour>{}) (?P<shape>{})(?: (?:{}) (?:{}) (?P<direction>{}))?".format(
        *("|".join(words) for words in (COLOURS, dict.fromkeys(SHAPES), VERBS["move"], SPEEDS, DIRECTIONS))
    )
)
_WAVES = 3  # of the background's texture
_WAVE_HEIGHT = 0.06  # of each of them, as a share of the background's brightness
_PAN = 0.3  # way of the background in a clip whose camera pans, as a share of the picture's width
_TURN = 4 / 3 * np.pi  # angle over the clip of what turns
_GROWTH = (0.65, 1.2)  # size at the start and the end of what grows, in its named size
_APART = 0.21  # how far from the picture's centre each of several objects has the middle of its way


@dataclass(frozen=True)
class Thing:
    """One object of a clip; the words are keys of the tables above.

    `offset` is the middle of its way, (down, right) of the picture's centre in shares of the shorter side; `grey` is
    how far its colour is mixed with mid grey.
    """

    shape: str
    colour: str
    tone: str
    texture: str
    size: str
    action: str
    direction: str
    speed: str
    verb: str
    offset: tuple[float, float]
    grey: float

    @property
    def description(self) -> str:
        """A clause: the object and what it does."""
        look = [self.size, "" if self.texture == "plain" else self.texture, "" if self.tone == "vivid" else self.tone]
        does = f"{self.verb} {self.speed} {self.direction}" if self.action == "move" else self.verb
        return " ".join(word for word in ("a", *look, self.colour, self.shape, does) if word)

    @property
    def rgb(self) -> np.ndarray:
        """The surface's colour, each channel in 0..1."""
        return _mixed(self.colour, self.grey)

    def centre(self, time: float) -> np.ndarray:
        """Where it is, (down, right), at `time` in 0..1."""
        way = SPEEDS[self.speed] * np.asarray(DIRECTIONS[self.direction]) if self.action == "move" else np.zeros(2)
        return np.asarray(self.offset) + way * (time - 0.5)

    def radius(self, time: float) -> float:
        """Half its width at `time`, as a share of the shorter side."""
        start, end = {"grow": _GROWTH, "shrink": _GROWTH[::-1]}.get(self.action, (1.0, 1.0))
        return SIZES[self.size] * (start + (end - start) * time)

    def angle(self, time: float) -> float:
        """How far it has turned at `time`, in radians."""
        return _TURN * time if self.action == "turn" else 0.0


@dataclass(frozen=True)
class Scene:
    """What happens in one clip; the first thing is in front of the others."""

    things: tuple[Thing, ...]
    background: str
    pan: str
    phrasing: str
    waves: tuple[tuple[float, float, float], ...]  # (down, right, phase) of the background's texture, in periods

    @property
    def caption(self) -> str:
        """The scene in a sentence or two."""
        *first, last = (thing.description for thing in self.things)
        objects = f"{', '.join(first)} and {last}" if first else last
        text = self.phrasing.format(
            objects=objects, Objects=objects[0].upper() + objects[1:], background=self.background
        )
        return f"{text} The camera pans to the {self.pan}." if self.pan else text


def scene(index: int) -> Scene:
    """Return scene number `index` (any whole number from 0 on)."""
    uniform = _uniform(index)

    def pick(words) -> str:
        words = list(words)
        return words[int(next(uniform) * len(words))]

    def between(low: float, high: float) -> float:
        return low + (high - low) * next(uniform)

    count = pick(COUNTS)
    background, pan, phrasing = pick(BACKGROUNDS), pick(PANS), pick(PHRASINGS)
    waves = tuple((between(-2.5, 2.5), between(-2.5, 2.5), between(0, 1)) for _ in range(_WAVES))
    first_angle = between(0, 2 * np.pi)
    things, colours = [], list(COLOURS)
    for i in range(count):
        tone = pick(TONES)
        grey = between(*TONES[tone])
        contrast = {name: np.linalg.norm(_mixed(name, grey) - BACKGROUNDS[background]) for name in colours}
        stand_out = [name for name in colours if contrast[name] > CONTRAST]
        colour = pick(stand_out or [max(contrast, key=contrast.get)])
        colours.remove(colour)  # no two objects of a clip have the same
        shape, action = pick(SHAPES), pick(ACTIONS)
        if action == "turn" and shape == "disc":
            action = "rest"  # nobody could tell
        angle, apart = first_angle + 2 * np.pi * i / count, _APART if count > 1 else 0.0
        things.append(
            Thing(
                shape=shape,
                colour=colour,
                tone=tone,
                texture=pick(TEXTURES),
                size=pick(SIZES if count == 1 else list(SIZES)[:2]),
                action=action,
                direction=pick(DIRECTIONS),
                speed=pick(SPEEDS),
                verb=pick(VERBS[action]),
                offset=(apart * np.sin(angle) + between(-0.1, 0.1), apart * np.cos(angle) + between(-0.1, 0.1)),
                grey=grey,
            )
        )
    return Scene(tuple(things), background, pan, phrasing, waves)


@dataclass(frozen=True)
class Named:
    """What a caption says of one object; `direction` is empty for what stays where it is."""

    shape: str
    colour: str
    direction: str


def parse_caption(text: str) -> tuple[Named, ...]:
    """Return the objects that a caption of this world names, in its order; empty for any other text."""
    return tuple(
        Named(**{name: word or "" for name, word in found.groupdict().items()}) for found in _CLAUSE.finditer(text)
    )


def caption(index: int) -> str:
    """Return the caption of clip `index` without drawing it: a stream of prompts."""
    return scene(index).caption


def clip(index: int, *, frames: int, height: int, width: int, style: str = "painted") -> tuple[np.ndarray, str]:
    """Draw clip `index`: float32 [frames height width 3] in [-1, 1], and its caption.

    Whatever happens takes the whole clip, whatever the number of frames.

    Args:
      index: any whole number from 0 on.
      frames: at least 1.
      height: pixels.
      width: pixels.
      style: `painted`, or `outline`: ink drawings on paper in other colours, under the same captions.
    """
    content = scene(index)
    return draw(content, frames=frames, height=height, width=width, style=style), content.caption


def draw(content: Scene, *, frames: int, height: int, width: int, style: str = "painted") -> np.ndarray:
    """Draw a scene: float32 [frames height width 3] in [-1, 1]."""
    video = np.empty((frames, height, width, 3), np.float32)
    for i, time in enumerate(np.arange(frames) / max(1, frames - 1)):
        picture = background(content, time, height=height, width=width, style=style)
        for thing in reversed(content.things):
            cover, surface = _paint(thing, time, height, width, style)
            picture += cover[..., None] * (surface - picture)
        video[i] = 2.0 * np.clip(picture, 0.0, 1.0) - 1.0
    return video


def background(content: Scene, time: float, *, height: int, width: int, style: str = "painted") -> np.ndarray:
    """Return the picture without the objects at `time` in 0..1, float32 [height width 3] in 0..1."""
    down, right = (np.mgrid[0:height, 0:width] + 0.5).astype(np.float32) / np.float32([[[height]], [[width]]])
    light = 1.1 - 0.2 * down  # a soft light from the top
    moved = {"": 0.0, "left": _PAN, "right": -_PAN}[content.pan] * (time - 0.5)
    for waves_down, waves_right, phase in content.waves:
        light += _WAVE_HEIGHT * np.sin(2 * np.pi * (waves_down * down + waves_right * (right - moved) + phase))
    colour = np.asarray(BACKGROUNDS[content.background])
    if style == "outline":
        colour = 0.9 * np.asarray(PAPER) + 0.1 * colour
        light = 1 + 0.3 * (light - 1)
    return (colour * light[..., None]).astype(np.float32)


def distance(shape: str, down: np.ndarray, right: np.ndarray, radius: float) -> np.ndarray:
    """Return the signed distance to the outline of a shape around the origin, negative inside.

    It is exact for the disc, and along the nearest side for the others.
    """
    if shape == "disc":
        return np.hypot(down, right) - radius

    def bar(half_height: float, half_length: float) -> np.ndarray:
        return np.maximum(np.abs(down) - half_height * radius, np.abs(right) - half_length * radius)

    return bar(*BAR) if shape == "bar" else np.minimum(bar(*CROSS), bar(*CROSS[::-1]))


def area(shape: str) -> float:
    """Return the area of a shape of radius 1."""
    if shape == "disc":
        return np.pi
    height, length = BAR if shape == "bar" else CROSS
    return 4 * height * (length if shape == "bar" else 2 * length - height)


def _paint(thing: Thing, time: float, height: int, width: int, style: str) -> tuple[np.ndarray, np.ndarray]:
    """Return how much of each pixel the thing covers, [height width], and its surface, [height width 3] or [3]."""
    short = min(height, width)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    centre, radius, angle = thing.centre(time), thing.radius(time), thing.angle(time)
    down = (y - (height - 1) / 2) / short - centre[0]
    right = (x - (width - 1) / 2) / short - centre[1]
    cos, sin = np.cos(angle), np.sin(angle)
    down, right = cos * down - sin * right, sin * down + cos * right
    outside = distance(thing.shape, down, right, radius)
    if style == "outline":
        line = np.abs(outside + 0.03) - 0.03
        return np.clip(0.5 - line * short, 0.0, 1.0), np.asarray(OUTLINE_COLOURS[thing.colour], np.float32)
    cover = np.clip(0.5 - outside * short, 0.0, 1.0)  # anti-aliased over one pixel
    return cover, _shade(thing.texture, down, right, radius)[..., None] * thing.rgb.astype(np.float32)


def _mixed(colour: str, grey: float) -> np.ndarray:
    """Return a colour mixed with so much mid grey, [3] in 0..1."""
    return (1 - grey) * np.asarray(COLOURS[colour]) + grey * 0.5


def _shade(texture: str, down: np.ndarray, right: np.ndarray, radius: float) -> np.ndarray:
    """Brightness of the surface, fixed to the shape; the pattern scales with it."""
    if texture == "plain":
        return np.ones_like(down)
    u, v = np.pi * down / (0.5 * radius), np.pi * right / (0.5 * radius)
    wave = np.sin(v) if texture == "striped" else np.cos(u) * np.cos(v)
    return 0.85 + 0.15 * np.clip(3.0 * wave, -1.0, 1.0)


def _uniform(index: int) -> Iterator[float]:
    """Yield the numbers in [0, 1) that decide clip `index`."""
    generator = np.random.Philox(np.random.SeedSequence([STREAM, index]))
    while True:
        yield from ((generator.random_raw(64) >> np.uint64(11)) * 2.0**-53).tolist()
