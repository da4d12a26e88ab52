"""One engine that reads a table of rules in both directions: PyTorch keys -> Flax leaves, and back.

A rule pairs a PyTorch key with the path of a Flax leaf and states the re-layout as an einops pattern. So no transpose
is ever guessed from a shape, and the way back is the same pattern with its sides exchanged. Conversion is strict:
every key of the file is matched by exactly one rule, every leaf of the model is filled, every shape agrees.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from einops import rearrange

from avd_jax.errors import UserError, closest

_ALIGNMENT = 64  # bytes, of XLA's own arrays on a CPU

# (key, rows) -> tensor, whole in shape, of which at least these rows of its first axis are filled; all for None.
Read = Callable[[str, tuple[int, int] | None], np.ndarray]


@dataclass(frozen=True)
class Rule:
    """One line of a conversion table.

    Attributes:
      source: PyTorch key; `{}` stands for a layer number.
      target: path of the Flax leaf, joined by dots. With `{}` it names the same layer's leaf; without, while the
        source has one, the layers are stacked along a new leading axis. None: the key is known and not needed.
      layout: einops pattern from the PyTorch array to the Flax array (of one layer); `...` for unchanged.
      sizes: axis lengths that the pattern's parentheses need, in either direction.
      part: which part of the leaf it fills, if several tensors (of a layer) are stacked into one leaf along an axis of
        their own, such as queries, keys and values. None: the whole leaf (of the layer).
    """

    source: str
    target: str | None
    layout: str = "... -> ..."
    sizes: Mapping[str, int] = field(default_factory=dict)
    part: int | None = None

    @property
    def stacked(self) -> bool:
        """Whether the layers of the source are stacked into one leaf."""
        return self.target is not None and "{}" in self.source and "{}" not in self.target

    def match(self, key: str) -> str | None:
        """Return the layer number in `key` ('' for a rule without one), or None if the key is not this rule's."""
        found = _pattern(self.source).fullmatch(key)
        if found is None:
            return None
        return found.group(1) if found.groups() else ""

    def to_flax(self, array):
        """Re-lay one PyTorch array (NumPy) as the Flax leaf, or as one layer of it."""
        return self._rearrange(array, self.layout)

    def to_torch(self, array):
        """Re-lay one Flax leaf, or one layer of it, as the PyTorch array."""
        source, target = self.layout.split("->")
        return self._rearrange(array, f"{target.strip()} -> {source.strip()}")

    def source_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the PyTorch array of a Flax leaf of `shape`, or of one layer of it."""
        return self.to_torch(np.broadcast_to(np.zeros((), np.bool_), shape)).shape  # one element, whatever the shape

    def _rearrange(self, array, pattern: str):
        return array if self.layout == "... -> ..." else rearrange(array, pattern, **self.sizes)


@functools.cache
def _pattern(name: str) -> re.Pattern:
    """Return what matches a key or path with a layer's number in place of `{}`."""
    return re.compile(re.escape(name).replace(r"\{\}", r"(\d+)"))


@dataclass(frozen=True)
class Piece:
    """One source tensor of a leaf: its key, its rule, and where it goes: (layer,), (part,), (layer, part) or ()."""

    key: str
    rule: Rule
    at: tuple[int, ...]


def resolve(
    rules: Sequence[Rule],
    sources: Mapping[str, tuple[int, ...]],
    targets: Mapping[str, jax.ShapeDtypeStruct],
    *,
    name: str,
) -> dict[str, list[Piece]]:
    """Match every source key to a rule and every Flax leaf to its sources, checking all shapes.

    Args:
      rules: the conversion table.
      sources: PyTorch key -> shape, of one file set.
      targets: dotted Flax path -> abstract leaf, of one model.
      name: what the messages call the source, usually its path.

    Returns:
      Flax path -> the pieces that fill it, in layer order.

    Raises:
      UserError: naming the keys that are unknown, missing or misshapen.
    """
    pieces: dict[str, list[Piece]] = {}
    unknown = []
    for key in sources:
        matches = [(rule, layer) for rule in rules if (layer := rule.match(key)) is not None]
        if not matches:
            unknown.append(key)
            continue
        if len(matches) > 1:
            raise AssertionError(f"{key} is matched by {len(matches)} rules: {[rule.source for rule, _ in matches]}")
        rule, layer = matches[0]
        if rule.target is None:
            continue
        path = rule.target if rule.stacked else rule.target.replace("{}", layer)
        at = (int(layer),) if rule.stacked else ()
        pieces.setdefault(path, []).append(Piece(key, rule, at if rule.part is None else (*at, rule.part)))
    for found in pieces.values():
        found.sort(key=lambda piece: piece.at)

    expected = dict(source_shapes(rules, targets))
    missing = [key for key in expected if key not in sources]
    extra = unknown + [p.key for path in pieces for p in pieces[path] if p.key not in expected]
    if missing or extra:
        raise UserError(_key_mismatch(name, missing, extra))
    misshapen = [
        f"{key} has shape {tuple(sources[key])}, expected {shape}"
        for key, shape in expected.items()
        if tuple(sources[key]) != shape
    ]
    if misshapen:
        raise UserError(f"{name}: wrong shapes: {_first(misshapen)}. The config beside it describes another model.")
    return pieces


def source_shapes(
    rules: Sequence[Rule], targets: Mapping[str, jax.ShapeDtypeStruct]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield every PyTorch key that a model needs, with its shape (sources and targets as in `resolve`)."""
    for path, leaf in targets.items():
        for rule, layer in rules_of(rules, path):
            count = leaf.shape[0] if rule.stacked else 1
            shape = leaf.shape[rule.stacked + (rule.part is not None) :]
            source = rule.source_shape(shape)
            for i in range(count):
                yield rule.source.replace("{}", str(i) if rule.stacked else layer), source


def rules_of(rules: Sequence[Rule], path: str) -> list[tuple[Rule, str]]:
    """Return the rule or, part by part, the rules that fill the Flax leaf `path`, with its layer ('' if none)."""
    found = []
    for rule in rules:
        if rule.target is None:
            continue
        match = _pattern(rule.target).fullmatch(path)
        if match:
            found.append((rule, match.group(1) if match.groups() else ""))
    if [rule.part for rule, _ in found] not in ([None], list(range(len(found) or 1))):
        raise AssertionError(f"leaf {path} is filled by {len(found)} rules: {[rule.source for rule, _ in found]}")
    return found


def layers_of(rules: Sequence[Rule], path: str, leaf: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the layers of a whole leaf in order, or the leaf itself if its layers are not stacked."""
    rule, _ = rules_of(rules, path)[0]
    yield from leaf if rule.stacked else [leaf]


def leaf_from_torch(pieces: Iterable[Piece], leaf: jax.ShapeDtypeStruct, read: Read) -> np.ndarray:
    """Return one whole leaf, in the leaf's dtype; arguments as in `read_shards`."""
    return read_shards(pieces, leaf, read, [tuple(slice(None) for _ in leaf.shape)])[0]


def leaves_from_torch(
    pieces: Mapping[str, Iterable[Piece]],
    targets: Mapping[str, jax.ShapeDtypeStruct],
    read: Read,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (path, array) leaf by leaf, in the target's dtype; no more than one leaf is held at a time."""
    for path, found in pieces.items():
        yield path, leaf_from_torch(found, targets[path], read)


def read_shards(
    pieces: Iterable[Piece],
    leaf: jax.ShapeDtypeStruct,
    read: Read,
    indices: Sequence[tuple[slice, ...]],
) -> list[np.ndarray]:
    """Return parts of one leaf, in the leaf's dtype, reading each source tensor once and holding one at a time.

    Of a tensor no more is read than the rows from the first to the last that is wanted, which lie together in its file.

    Args:
      pieces: the tensors that fill the leaf, from `resolve`.
      leaf: shape and dtype of the whole leaf.
      read: see `Read`.
      indices: the wanted parts, each one slice an axis (as `Sharding.addressable_devices_indices_map` has them).
    """
    bounds = [[part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True)] for index in indices]
    shards = [_empty([stop - start for start, stop in bound], leaf.dtype) for bound in bounds]
    rows: dict[tuple, tuple[int, int] | None] = {}
    for piece in pieces:
        depth = len(piece.at)
        wanted = [
            i
            for i, bound in enumerate(bounds)
            if all(start <= at < stop for at, (start, stop) in zip(piece.at, bound[:depth], strict=True))
        ]
        if not wanted:
            continue
        boxes = tuple(dict.fromkeys(tuple(bounds[i][depth:]) for i in wanted))
        if (piece.rule.source, boxes) not in rows:
            rows[piece.rule.source, boxes] = _rows(piece.rule, leaf.shape[depth:], boxes)
        array = piece.rule.to_flax(read(piece.key, rows[piece.rule.source, boxes]))
        for i in wanted:
            place = tuple(at - start for at, (start, _) in zip(piece.at, bounds[i][:depth], strict=True))
            shards[i][place] = array[indices[i][depth:]]
    return shards


def _rows(rule: Rule, shape: Sequence[int], boxes: Sequence[tuple[tuple[int, int], ...]]) -> tuple[int, int] | None:
    """Return first and last + 1 of the source's rows that parts of a piece come from; None for all.

    Args:
      rule: of the piece.
      shape: of the piece as it is in the leaf.
      boxes: the parts, each (start, stop) for every axis.
    """
    source = rule.source_shape(shape)
    if not source or tuple((0, size) for size in shape) in boxes:
        return None
    row_of = np.arange(source[0], dtype=np.int32).reshape(-1, *(1,) * (len(source) - 1))
    row_of = rule.to_flax(np.broadcast_to(row_of, source))
    inside = [row_of[tuple(slice(*ends) for ends in box)] for box in boxes]
    inside = [part for part in inside if part.size]
    if not inside:
        return 0, 0
    found = min(int(part.min()) for part in inside), max(int(part.max()) for part in inside) + 1
    return None if found == (0, source[0]) else found


def _empty(shape: Sequence[int], dtype) -> np.ndarray:
    """Return an array like `np.empty`, so aligned that JAX on a CPU takes its memory over instead of copying it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def tensors_to_torch(
    rules: Sequence[Rule], leaves: Iterable[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (PyTorch key, contiguous array) tensor by tensor from (path, array) leaves."""
    for path, array in leaves:
        for rule, layer in rules_of(rules, path):
            part = () if rule.part is None else (rule.part,)
            for i in range(array.shape[0]) if rule.stacked else (None,):
                own = array[part if i is None else (i, *part)]
                key = rule.source.replace("{}", layer if i is None else str(i))
                yield key, np.ascontiguousarray(rule.to_torch(own))


def _key_mismatch(name: str, missing: list[str], extra: list[str]) -> str:
    parts = []
    if missing:
        parts.append("missing: " + _first([key + closest(key, extra) for key in missing]))
    if extra:
        parts.append("not known: " + _first([key + closest(key, missing) for key in extra]))
    return f"{name}: the keys do not fit the model; {'; '.join(parts)}. It is incomplete, or another model's."


def _first(items: list[str], count: int = 4) -> str:
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more
