"""The Wan2.1 VAE over a clip: frames in groups and pictures in tiles, so that memory grows with neither.

Groups follow one another in a `lax.scan` that carries what the causal convolutions have seen: one group is compiled,
not n + 1. Tiles are rectangles of one size, and a scan around it goes through them. Each comes with as many
neighbouring rows and columns as its convolutions reach, and what those give is cut off: no seam is left to blend.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from avd_jax.errors import UserError

Tiles = tuple[int, int]  # how many along the height, and along the width

GIB = 2**30
MEMORY_GIB = 8.0  # of a device for coding a clip, the clip included: half of what the smallest TPUs have
LANES = 128  # pixels to whose multiples TPUs round a picture's height up


def nbytes(tree) -> int:
    """Return the bytes of all arrays of a tree, abstract ones too."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def reach(layers, unit: int) -> tuple[int, int]:
    """Return how many units before and after one of their result layers see; `unit` is its length before them."""
    before = after = 0
    for layer in reversed(layers):
        before, after = layer.reach(before, after)
    return -(-before // unit), -(-after // unit)


@dataclasses.dataclass(frozen=True)
class Side:
    """A side of a picture, cut into tiles. Lengths are in units, the pixels of the latents.

    Attributes:
      size: of the side.
      tiles: how many there are.
      before, after: neighbours that a tile needs on each side, if there are any.
    """

    size: int
    tiles: int = 1
    before: int = 0
    after: int = 0

    @property
    def extent(self) -> int:
        """Length of every tile, with its neighbours."""
        return min(self.size, -(-(self.size + (self.tiles - 1) * (self.before + self.after)) // self.tiles))

    def places(self) -> np.ndarray:
        """Return, for each tile, where it begins and how many of its first units the tile before it has made.

        The last tiles are moved back to end with the picture. What a tile makes too far is overwritten by the next.
        """
        step = max(self.extent - self.before - self.after, 0)
        places = [(min(tile * step, self.size - self.extent), self.before) for tile in range(self.tiles)]
        return np.array([(0, 0), *places[1:]], np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Pass:
    """A clip and the layers that it goes through group by group; its first frame is a group of its own.

    Attributes:
      clip: [B 1+n*frames_in H W C].
      network: `network(frames, past, first)` returns frames and what it keeps, see `vae_layers.py`.
      frames_in, frames_out: of a group.
      pixels_in, pixels_out: a unit of the picture.
      reach: units before and after one of the result that it depends on.
      working: bytes that are held meanwhile for each byte that the layers keep for the next group: what the TPU
        compiler makes of Wan's sizes, at most. `benchmarks/vae_memory.py` compares.
    """

    clip: jax.Array
    network: Callable
    frames_in: int = 1
    frames_out: int = 1
    pixels_in: int = 1
    pixels_out: int = 1
    reach: tuple[int, int] = (0, 0)
    working: float = 0.0

    @functools.cached_property
    def _unit(self):
        """Shape and dtype of what one frame of one unit becomes, and of what the layers keep of it."""
        batch, channels = self.clip.shape[0], self.clip.shape[-1]
        frame = jax.ShapeDtypeStruct((batch, 1, self.pixels_in, self.pixels_in, channels), self.clip.dtype)
        return jax.eval_shape(lambda frame: self.network(frame, None), frame)

    def _sides(self, tiles: Tiles) -> tuple[Side, Side]:
        sizes = (size // self.pixels_in for size in self.clip.shape[2:4])
        return tuple(Side(size, count, *self.reach) for size, count in zip(sizes, tiles, strict=True))

    @property
    def result(self) -> jax.ShapeDtypeStruct:
        """Shape [B F H W C] and dtype of what comes out."""
        frames = 1 + (self.clip.shape[1] - 1) // self.frames_in * self.frames_out
        picture = (size // self.pixels_in * self.pixels_out for size in self.clip.shape[2:4])
        unit = self._unit[0]
        return jax.ShapeDtypeStruct((unit.shape[0], frames, *picture, unit.shape[-1]), unit.dtype)

    def run(self, tiles: Tiles = (1, 1)) -> jax.Array:
        """Return the result, made in so many tiles."""
        clip, (height, width) = self.clip, self._sides(tiles)
        batch, frames, _, _, channels = clip.shape
        groups = 1 + (frames - 1) // self.frames_in
        group = batch, self.frames_in, height.extent * self.pixels_in, width.extent * self.pixels_in, channels
        if frames < self.frames_in:  # what comes behind the first frame does not matter
            clip = jnp.pad(clip, ((0, 0), (0, self.frames_in - frames), (0, 0), (0, 0), (0, 0)), mode="edge")

        def nothing_seen(leaf):
            *others, rows, columns, kept_channels = leaf.shape  # of one unit
            return jnp.zeros((*others, rows * height.extent, columns * width.extent, kept_channels), leaf.dtype)

        def run_tile(out, place):
            row, done_rows, column, done_columns = place

            def corner(number, frames, pixels):
                return 0, jnp.maximum(number * frames - frames + 1, 0), row * pixels, column * pixels, 0

            def run_group(past_and_out, number):
                past, out = past_and_out
                seen = jax.lax.dynamic_slice(clip, corner(number, self.frames_in, self.pixels_in), group)
                y, past = self.network(seen, past, number == 0)
                # The first group's frames behind its first are overwritten by the second group's.
                y, begin = y[:, : out.shape[1]], corner(number, self.frames_out, self.pixels_out)
                if tiles != (1, 1):
                    rows = jnp.arange(y.shape[2])[:, None, None] >= done_rows * self.pixels_out
                    columns = jnp.arange(y.shape[3])[:, None] >= done_columns * self.pixels_out
                    y = jnp.where(rows & columns, y, jax.lax.dynamic_slice(out, begin, y.shape))
                return (past, jax.lax.dynamic_update_slice(out, y, begin)), None

            past = jax.tree.map(nothing_seen, self._unit[1])
            return jax.lax.scan(run_group, (past, out), jnp.arange(groups))[0][1], None

        out = jnp.zeros(self.result.shape, self.result.dtype)
        if tiles == (1, 1):
            return run_tile(out, (0, 0, 0, 0))[0]
        rows, columns = height.places(), width.places()
        places = np.concatenate([np.repeat(rows, len(columns), axis=0), np.tile(columns, (len(rows), 1))], axis=1)
        return jax.lax.scan(run_tile, out, places)[0]

    @functools.cached_property
    def _bytes(self) -> tuple[int, float]:
        """Bytes of clip and result, and of what is held for a unit of a tile."""
        # The clip counts twice: the loops read a copy of it in a layout that suits them.
        return nbytes((self.clip, self.clip, self.result)), self.working * nbytes(self._unit[1])

    def needed(self, tiles: Tiles) -> float:
        """Return about how many bytes of a device `run` takes, clip and result included."""
        (ends, working), (height, width) = self._bytes, (side.extent for side in self._sides(tiles))
        lanes = LANES // max(self.pixels_in, self.pixels_out)
        return ends + working * -(-height // lanes) * lanes * width

    def _counts(self, size: int) -> list[int]:
        """Return into how many tiles it makes sense to cut a side: of those of one extent, the fewest."""
        extents = {}
        for count in range(1, max(size - sum(self.reach), 1) + 1):
            extents.setdefault(Side(size, count, *self.reach).extent, count)
        return list(extents.values())

    def tiles_within(self, memory_gib: float, held: int) -> Tiles:
        """Return into how many tiles height and width are cut so that the fewest pixels are made twice.

        Args:
          memory_gib: of a device.
          held: bytes of it that something else takes.

        Raises:
          UserError: the smallest tiles are too large.
        """
        if self.needed((1, 1)) + held <= memory_gib * GIB:
            return 1, 1
        sizes = [side.size for side in self._sides((1, 1))]
        choices = list(itertools.product(*(self._counts(size) for size in sizes)))
        fitting = [tiles for tiles in choices if self.needed(tiles) + held <= memory_gib * GIB]
        if not fitting:
            shape = self.clip.shape[0], *(size * max(self.pixels_in, self.pixels_out) for size in sizes)
            least = (min(map(self.needed, choices)) + held) / GIB
            raise UserError(
                f"the VAE takes {least:.3g} GiB of a device for {shape[0]} x {shape[1]}x{shape[2]} pixels even in the "
                f"smallest tiles, and {memory_gib:g} are granted; grant more (--vae_gib, in a training "
                "config.sample.vae_gib), or give fewer frames, pixels or clips at once"
            )
        return min(
            fitting, key=lambda tiles: (math.prod(side.tiles * side.extent for side in self._sides(tiles)), tiles)
        )
