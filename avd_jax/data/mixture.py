"""Several encoded sets as one: how a user names them, whether they go together, and how much of each is drawn when.

    a                        one set
    a,b                      each clip as often as any other: a set's share is that of its records
    a:3,b:1                  three examples of four come from a

The order follows from the seed and the shares, position by position, so that a run can go on from any.
"""

import math
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from avd_jax.data.latents import (
    EncodedSet,
    LatentsInfo,
    PromptsInfo,
    published_lengths,
    read_metadata,
    set_fingerprint,
)
from avd_jax.errors import UserError
from avd_jax.paths import any_path

WINDOW = 10_000  # positions in which each set has exactly its share
_LATENTS_AGREE = ("text_dim", "text_encoder", "vae", "fps")
_PROMPTS_AGREE = ("text_dim", "text_encoder")


class NamedSet(NamedTuple):
    """A set as it is named: its folder, and its weight or None."""

    path: str
    weight: float | None


def named_sets(text: str | os.PathLike) -> list[NamedSet]:
    """Return the sets that a text names, `FOLDER[:WEIGHT],...`.

    What is behind the last colon of a folder is its weight, unless there is a slash in it, nothing at all, or a folder
    of the whole name: `gs://bucket/a`, `C:` and a folder called `run:2` are paths.

    Raises:
      UserError: a weight that is no positive number or that only some of the sets have, or a path that is none.
    """
    found = [_named(entry.strip()) for entry in os.fspath(text).split(",") if entry.strip()]
    without = [one.path for one in found if one.weight is None]
    if 0 < len(without) < len(found):
        raise UserError(f"{without[0]} has no weight, others have one; give each one, as in a:3,b:1, or none")
    return found


def _named(entry: str) -> NamedSet:
    path, colon, weight = entry.rpartition(":")
    is_path = not colon or not path or not weight or "/" in weight or "\\" in weight
    if is_path or any_path(entry).exists():
        any_path(entry)
        return NamedSet(entry, None)
    any_path(path)
    try:
        value = float(weight)
    except ValueError:
        raise UserError(f"{entry}: the weight {weight!r} is no number, and there is no folder of that name") from None
    if not 0 < value < math.inf:
        raise UserError(f"{entry}: the weight must be a positive number; leave a set out that is not to be used")
    return NamedSet(path, value)


def read_infos(text: str | os.PathLike, kind: str) -> list[LatentsInfo | PromptsInfo]:
    """Return what each named set was encoded with, having checked that they can be mixed.

    Raises:
      UserError: no set of this kind, the same set twice, or sets of other networks or another frame rate.
    """
    sets = named_sets(text)
    infos = [read_metadata(one.path) for one in sets]
    for one, info in zip(sets, infos, strict=True):
        if info.kind != kind:
            raise UserError(f"{one.path}: is a set of {info.kind}, not of {kind}")
        for field in _LATENTS_AGREE if kind == "latents" else _PROMPTS_AGREE:
            _check_alike(field, (one.path, info), (sets[0].path, infos[0]))
    seen: dict[str, str] = {}
    for one in sets if len(sets) > 1 else ():
        other = seen.setdefault(set_fingerprint(one.path), one.path)
        if other is not one.path:
            raise UserError(f"{one.path}: is the same set as {other}; name it once, with the weight that it is to have")
    return infos


def _check_alike(field: str, one: tuple, other: tuple) -> None:
    (path, info), (first_path, first) = one, other
    here, there = getattr(info, field), getattr(first, field)
    if here != there:
        how = "--fps" if field == "fps" else "--weights"
        raise UserError(f"{path}: {field} is {here}, that of {first_path} is {there}; encode both with the same {how}.")


def open_sets(text: str | os.PathLike, kind: str) -> list[EncodedSet]:
    """Open the named sets, see `read_infos`."""
    read_infos(text, kind)
    return [EncodedSet(one.path, kind) for one in named_sets(text)]


def shares(text: str | os.PathLike) -> list[float]:
    """Return the expected share of each named set in all examples: that of its weight, or else of its records."""
    sets = named_sets(text)
    weights = [sum(published_lengths(any_path(one.path))) if one.weight is None else one.weight for one in sets]
    return [weight / sum(weights) for weight in weights]


def fingerprint(text: str | os.PathLike) -> str:
    """Return a short text that identifies the named sets with their order and weights; see `set_fingerprint`."""
    sets = named_sets(text)
    found = [set_fingerprint(one.path) for one in sets]
    if len(sets) == 1:
        return found[0]
    weights = ["" if one.weight is None else f":{one.weight:g}" for one in sets]
    return ",".join(digest + weight for digest, weight in zip(found, weights, strict=True))


class Interleaved:
    """An endless random order of a few numbers, in which each has its share.

    `order[index]` is (which, how often it came before). In each window of WINDOW positions the counts are exact, to
    within one in a window, and everyone comes at least once.
    """

    def __init__(self, parts: Sequence[float], seed: int):
        """Take the share of each number, of which the sum is 1."""
        exact = np.asarray(parts, np.float64) * WINDOW
        counts = np.maximum(np.floor(exact).astype(int), 1)
        for which in np.argsort(counts - exact, kind="stable")[: max(0, WINDOW - counts.sum())]:
            counts[which] += 1
        counts[np.argmax(counts)] -= counts.sum() - WINDOW  # what the rarest were given beyond their share
        self._counts, self._seed = counts, seed
        self._window = lru_cache(8)(self._make_window)

    def __getitem__(self, index: int) -> tuple[int, int]:
        if len(self._counts) == 1:
            return 0, index
        window, within = divmod(index, WINDOW)
        order, before = self._window(window)
        which = int(order[within])
        return which, window * int(self._counts[which]) + int(before[within])

    def _make_window(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.repeat(np.arange(len(self._counts)), self._counts)
        # Not a Generator: what this one gives will never change, so a run can resume with any version of NumPy.
        order = np.random.RandomState([self._seed, window]).permutation(labels)
        before = np.empty_like(order)
        for which, count in enumerate(self._counts):
            before[order == which] = np.arange(count)
        return order, before
