"""Reading a video of the built-in world (`data/shapes_world.py`): which objects are where, is the caption right.

Objects of a clip differ in colour, so that each is found as the pixels of its colour. Nothing here knows how a clip was
made: it looks at any video of the painted style and reads off the background, the objects' colours, outlines and ways.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from avd_jax.data import shapes_world

WHOLE = 0.004  # share of the picture's pixels that a patch of colour needs to count as an object
SEEN = 0.5  # share of the frames in which an object of the clip is to be seen
MOVED = 0.11  # way over the whole clip, in shares of the shorter side: half of the slowest
JUMP = 0.13  # way between two frames that no object goes
REPAINTED = 0.2  # change of colour (largest of the channels, 0..1) by which a pixel has changed
CHANGED = 0.012  # share of the pixels that must have changed once for a clip to be dynamic
_SHADES = (0.7, 0.85, 1.0)
_GREYS = (0.0, 0.15, 0.3, 0.45, 0.55)
_LIGHTS = (0.75, 0.9, 1.05, 1.2, 1.35)


@dataclass(frozen=True)
class Track:
    """One object through a clip; lists run over all frames.

    Attributes:
      colour: its name.
      masks: [F H W] bool.
      parts: number of its separate patches in each frame; 0 if it is not seen.
      centres: [F 2] (down, right) in shares of the shorter side; NaN if it is not seen.
      bordering: [F] bool, whether it touches the picture's border.
      free: [F] bool, whether it touches neither that nor another object.
    """

    colour: str
    masks: np.ndarray
    parts: np.ndarray
    centres: np.ndarray
    bordering: np.ndarray
    free: np.ndarray

    @property
    def way(self) -> np.ndarray:
        """How far it goes over the whole clip, (down, right) in shares of the shorter side, by a fitted line."""
        seen = np.flatnonzero(self.free if self.free.sum() >= 4 else self.parts > 0)
        if len(seen) < 2:
            return np.zeros(2)
        return np.polyfit(seen, self.centres[seen], 1)[0] * (len(self.masks) - 1)

    @property
    def direction(self) -> str:
        """The nearest of the world's directions; empty if it stays."""
        if np.abs(self.way).max() < MOVED:
            return ""
        return max(shapes_world.DIRECTIONS, key=lambda name: np.dot(self.way, shapes_world.DIRECTIONS[name]))

    @property
    def shape(self) -> str:
        """The shape that its outline is most like, at any angle, in the frames that show most of it."""
        areas = self.masks.sum(axis=(1, 2)) * np.where(self.free, 1.0, 0.3)
        best = np.argsort(areas)[-5:]
        votes = [_likeness(self.masks[i]) for i in best if areas[i] > 0]
        total = {name: sum(vote[name] for vote in votes) for name in _TEMPLATES}
        return max(total, key=total.get)


@dataclass(frozen=True)
class Reading:
    """What is to be seen in a video.

    Attributes:
      tracks: the objects that are there in at least half of the frames.
      found: the colours of all patches of each frame that are large enough to be objects.
    """

    tracks: list[Track]
    found: list[set[str]]


def alignment(reading: Reading, caption: str) -> dict[str, float]:
    """Return which share of what the caption says is to be seen: colour, shape, direction, and their mean, 0..1.

    Colour is the objects named and seen over those named or seen. A shape or direction is right only for an object
    that is seen; "stays", "turns", "grows" and "shrinks" are right as directions if the object stays in place.
    A caption of another world is a ValueError.
    """
    named = {thing.colour: thing for thing in shapes_world.parse_caption(caption)}
    if not named:
        raise ValueError(f"not a caption of the built-in world: {caption!r}")
    seen = {track.colour: track for track in reading.tracks}
    both = named.keys() & seen.keys()
    scores = {
        "colour": len(both) / len(named.keys() | seen.keys()),
        "shape": sum(seen[colour].shape == named[colour].shape for colour in both) / len(named),
        "direction": sum(seen[colour].direction == named[colour].direction for colour in both) / len(named),
    }
    return {"mean": sum(scores.values()) / len(scores), **scores}


def instance_preservation(reading: Reading) -> float:
    """Return in which share of the frames the clip's objects are all there, once each and where they can be, 0..1.

    A frame fails if an object is missing (unless another one hides it, or it has left the picture), is in two places
    (unless another one divides it), or has jumped since it was last seen. It also fails if it shows an object that the
    rest of the clip does not have. A video without any object scores 0.
    """
    if not reading.tracks:
        return 0.0
    colours = {track.colour for track in reading.tracks}
    good = np.array([found <= colours for found in reading.found])
    for track in reading.tracks:
        others = np.zeros(track.masks.shape, bool)
        for other in reading.tracks:
            if other is not track:
                others |= other.masks
        good &= [_as_expected(track, frame, others) for frame in range(len(good))]
    return float(good.mean())


def dynamic_degree(video: np.ndarray) -> float:
    """Return 1 if objects really move, turn or change their size, else 0: see REPAINTED and CHANGED."""
    change = np.abs(video - video[:1]).max(-1) / 2 > REPAINTED
    return float(change.mean(axis=(1, 2)).max() >= CHANGED)


def _as_expected(track: Track, frame: int, others: np.ndarray) -> bool:
    before = np.flatnonzero(track.parts[:frame])
    if track.parts[frame] == 0:
        near = before[-1] if len(before) else np.flatnonzero(track.parts)[0]
        return bool(track.bordering[near] or np.any(_grown(track.masks[near]) & others[frame]))
    if track.parts[frame] > 1:
        return bool(np.any(_grown(track.masks[frame]) & others[frame]))
    if len(before) and track.free[frame] and track.free[before[-1]]:
        return float(np.abs(track.centres[frame] - track.centres[before[-1]]).max()) < JUMP * (frame - before[-1])
    return True


def read(video: np.ndarray) -> Reading:
    """Find the objects of a video [F H W 3] in [-1, 1]."""
    pixels = (np.clip(video, -1, 1) + 1) / 2
    palette, names = _palette(_background(pixels))
    # First all colours are possible. Mixtures at edges are then named after colours that are not there, so that in the
    # second look only those are that cover an object's size.
    labels = _nearest(pixels, palette, names)
    found = [{name for name in shapes_world.COLOURS if _patches(frame == name)} for frame in labels]
    there = [name for name in shapes_world.COLOURS if sum(name in seen for seen in found) >= SEEN * len(found)]
    kept = [i for i, name in enumerate(names) if name in there or not name]
    labels = _nearest(pixels, palette[kept], [names[i] for i in kept])
    patches = {name: [_patches(frame == name) for frame in labels] for name in there}
    nothing = np.zeros(labels.shape[1:], bool)
    masks = {name: np.stack([np.any([nothing, *frame], axis=0) for frame in patches[name]]) for name in there}
    return Reading([_track(name, patches[name], masks) for name in there], found)


def _track(name: str, patches: list[list[np.ndarray]], masks: dict[str, np.ndarray]) -> Track:
    own, size = masks[name], np.array(masks[name].shape[1:])
    centres, bordering, touching = np.full((len(own), 2), np.nan), np.zeros(len(own), bool), np.zeros(len(own), bool)
    for i in np.flatnonzero(own.any((1, 2))):
        places = np.argwhere(own[i])
        centres[i] = (places.mean(0) - (size - 1) / 2) / size.min()
        bordering[i] = (places <= 1).any() or (places >= size - 2).any()
        near = _grown(own[i])
        touching[i] = any((near & mask[i]).any() for other, mask in masks.items() if other != name)
    return Track(
        colour=name,
        masks=own,
        parts=np.array([len(found) for found in patches]),
        centres=centres,
        bordering=bordering,
        free=own.any((1, 2)) & ~bordering & ~touching,
    )


def _background(pixels: np.ndarray) -> str:
    """Return the name of the background that most pixels are like."""
    flat = pixels.reshape(-1, 3)[:: max(1, pixels[..., 0].size // 8192)]
    lights = np.asarray(_LIGHTS)[:, None, None]

    def distance(name: str) -> np.ndarray:
        return np.linalg.norm(flat - lights * np.asarray(shapes_world.BACKGROUNDS[name]), axis=-1).min(0)

    names = list(shapes_world.BACKGROUNDS)
    nearest = np.argmin(np.stack([distance(name) for name in names]), axis=0)
    return names[np.bincount(nearest).argmax()]


def _palette(background: str) -> tuple[np.ndarray, list[str]]:
    """Return colours that the world can show, [N 3], and their names, "" for those of the background."""
    colours, names = [], []
    for name, rgb in shapes_world.COLOURS.items():
        for grey in _GREYS:
            for shade in _SHADES:
                colours.append(shade * ((1 - grey) * np.asarray(rgb) + grey * 0.5))
                names.append(name)
    for light in _LIGHTS:
        colours.append(light * np.asarray(shapes_world.BACKGROUNDS[background]))
        names.append("")
    return np.clip(np.stack(colours), 0, 1), names


def _nearest(pixels: np.ndarray, palette: np.ndarray, names: list[str]) -> np.ndarray:
    """Return the name of each pixel's nearest colour, [F H W] of str."""
    flat, twice, sizes = pixels.reshape(-1, 3), 2 * palette.T, np.square(palette).sum(-1)
    nearest = np.empty(len(flat), np.intp)
    for start in range(0, len(flat), 4096):  # as many as a processor's cache holds, with their distances
        part = slice(start, start + 4096)
        distance = flat[part] @ twice
        nearest[part] = np.subtract(sizes, distance, out=distance).argmin(-1)  # up to what all colours have alike
    return np.asarray(names)[nearest].reshape(pixels.shape[:-1])


def _patches(mask: np.ndarray) -> list[np.ndarray]:
    """Return the connected patches of a mask [H W] that are large enough to be objects, without thin lines."""
    opened = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(opened, connectivity=4)
    return [labels == i for i in range(1, count) if stats[i, cv2.CC_STAT_AREA] >= WHOLE * mask.size]


def _grown(mask: np.ndarray) -> np.ndarray:
    return cv2.dilate(mask.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0


def _template(shape: str, angle: float) -> np.ndarray:
    """Return a shape of unit area around the origin on a grid of 48 x 48 points over [-1.2, 1.2]^2, bool."""
    y, x = np.mgrid[-1.2:1.2:48j, -1.2:1.2:48j]
    down, right = np.cos(angle) * y - np.sin(angle) * x, np.sin(angle) * y + np.cos(angle) * x
    return shapes_world.distance(shape, down, right, shapes_world.area(shape) ** -0.5) <= 0


_TEMPLATES = {
    "disc": np.stack([_template("disc", 0.0)]),
    "bar": np.stack([_template("bar", angle) for angle in np.arange(0, np.pi, np.pi / 18)]),
    "cross": np.stack([_template("cross", angle) for angle in np.arange(0, np.pi / 2, np.pi / 18)]),
}


def _likeness(mask: np.ndarray) -> dict[str, float]:
    """Return the overlap (intersection over union) of a mask [H W] with each shape of its own place and area."""
    places = np.argwhere(mask)
    centre, side = places.mean(0), np.sqrt(len(places))
    grid = np.round(centre[:, None, None] + np.mgrid[-1.2:1.2:48j, -1.2:1.2:48j] * side).astype(int)
    inside = ((grid >= 0) & (grid < np.array(mask.shape)[:, None, None])).all(0)
    own = np.zeros(inside.shape, bool)
    own[inside] = mask[tuple(grid[:, inside])]
    return {
        name: float(np.max((own & shapes).sum((1, 2)) / (own | shapes).sum((1, 2))))
        for name, shapes in _TEMPLATES.items()
    }
