"""A student as a LoRA on its teacher: the difference of their weights, matrix by matrix in its leading singular parts.

What is no matrix of a linear layer is stored whole, as `.diff` of a weight and `.diff_b` of a bias. diffusers takes no
such keys: its file has biases as PEFT's `lora_B.bias`, and what PEFT has no form for goes to a second file.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from avd_jax.convert.adapter_keys import Target, targets
from avd_jax.convert.comfyui import native_tensors
from avd_jax.convert.low_rank import leading
from avd_jax.convert.weights import Weights
from avd_jax.errors import UserError
from avd_jax.models.wan_dit import WanDiTConfig

RANKS = (16, 32, 64, 128)  # whose errors are told, whichever is written
FULL = 0  # as a rank: whatever a matrix has

Tensors = Iterator[tuple[str, np.ndarray]]


@dataclasses.dataclass
class Errors:
    """How far the student is from its teacher, and from the teacher with an adapter.

    Attributes:
      change: squared Frobenius norm of all differences.
      left: rank -> that of what an adapter of the rank leaves out.
      beside: of what is not in the adapter's main file (`Extraction.rest`).
    """

    change: float
    left: dict[int, float]
    beside: float = 0.0

    def relative(self) -> dict[int, float]:
        """Return rank -> Frobenius norm of what is left out, as a share of the whole difference's; FULL is 0."""
        return {rank: math.sqrt(left / self.change) if self.change else 0.0 for rank, left in self.left.items()}


def largest_rank(config: WanDiTConfig) -> int:
    """Return the rank from which on no matrix of a transformer has more."""
    return max(min(target.shape) for target in targets(config).values() if target.is_linear)


def parameters(config: WanDiTConfig, rank: int) -> int:
    """Return how many numbers an adapter of a rank has."""
    return sum(
        _rank(target, rank) * sum(target.shape) if target.is_linear else math.prod(target.shape)
        for target in targets(config).values()
    )


class Extraction:
    """The adapter that makes a teacher into a student.

    Attributes:
      leaves: key -> shape and dtype of its tensors.
      rest: the same for what goes to a second file.
      errors: complete once `stream` is at its end.
    """

    def __init__(self, student: Weights, teacher: Weights, *, rank: int, style: str, dtype):
        """Check that both are of the same sizes; nothing is read yet.

        Args:
          student, teacher: opened transformers.
          rank: of each pair, or FULL; matrices of a lower rank get all that they have.
          style: one of `adapter_keys.STYLES`.
          dtype: of the tensors.

        Raises:
          UserError: another model than the student's, or a rank that no matrix has.
        """
        config = student.config
        if teacher.config != config:
            other = teacher.config
            raise UserError(
                f"--teacher: has width {other.dim} and {other.num_layers} blocks, the student width {config.dim} and "
                f"{config.num_layers} blocks; give the weights that the student started from"
            )
        most = largest_rank(config)
        if not 0 <= rank <= most:
            raise UserError(f"--rank {rank}: no matrix of this model has more than {most}; give 1 to {most}, or full")
        self._student, self._teacher, self._rank, self._style = student, teacher, rank, style
        self._dtype = np.dtype(dtype)
        self.errors = Errors(0.0, dict.fromkeys((*(r for r in sorted({*RANKS, rank}) if 0 < r <= most), FULL), 0.0))
        self.leaves: dict[str, jax.ShapeDtypeStruct] = {}
        self.rest: dict[str, jax.ShapeDtypeStruct] = {}
        for target in targets(config).values():
            (self.rest if self._is_rest(target) else self.leaves).update(self._announced(target))

    def stream(self, rest: dict[str, np.ndarray]) -> Tensors:
        """Yield the tensors of `leaves`, holding one parameter at a time; those of `rest` are put into `rest`."""
        pairs = zip(native_tensors(self._student), native_tensors(self._teacher), strict=True)
        for (target, after), (_, before) in pairs:
            change = after.astype(np.float32) - before.astype(np.float32)
            if not np.isfinite(change).all():
                raise UserError(f"{target.key} is not finite in the student or its teacher; give other weights")
            size = float(np.sum(np.square(change, dtype=np.float64)))
            self.errors.change += size
            if target.is_linear:
                yield from self._pair(target, change, size)
            elif self._is_rest(target):
                self.errors.beside += size
                rest[_whole_key(target, self._style)] = change.astype(self._dtype)
            else:
                yield _whole_key(target, self._style), change.astype(self._dtype)

    def _pair(self, target: Target, change: np.ndarray, size: float) -> Tensors:
        own = min(target.shape)
        wanted = _rank(target, self._rank)
        u, s, vt = leading(change, max(wanted, *(rank for rank in self.errors.left if rank <= own), 1))
        for rank in self.errors.left:
            if 0 < rank < own:
                kept = float(np.sum(np.square(s[:rank], dtype=np.float64)))
                self.errors.left[rank] += max(0.0, size - kept)
        root = np.sqrt(s[:wanted])  # both factors as large, so that neither leaves the range of half precision
        down, up, alpha = _pair_keys(target, self._style)
        yield down, (root[:, None] * vt[:wanted]).astype(self._dtype)
        yield up, (u[:, :wanted] * root).astype(self._dtype)
        if alpha:
            yield alpha, np.asarray(wanted, np.float32)

    def _announced(self, target: Target) -> Mapping[str, jax.ShapeDtypeStruct]:
        if not target.is_linear:
            return {_whole_key(target, self._style): jax.ShapeDtypeStruct(target.shape, self._dtype)}
        rank, (rows, columns) = _rank(target, self._rank), target.shape
        down, up, alpha = _pair_keys(target, self._style)
        pair = {down: (rank, columns), up: (rows, rank)}
        leaves = {key: jax.ShapeDtypeStruct(shape, self._dtype) for key, shape in pair.items()}
        return leaves | ({alpha: jax.ShapeDtypeStruct((), np.dtype(np.float32))} if alpha else {})

    def _is_rest(self, target: Target) -> bool:
        return self._style == "diffusers" and not target.of_linear


def _rank(target: Target, rank: int) -> int:
    return min(rank or max(target.shape), *target.shape)


def _pair_keys(target: Target, style: str) -> tuple[str, str, str]:
    """Return the keys of the factors and of alpha; '' for none, which stands for an alpha like the rank.

    diffusers reads a ComfyUI file too, but for one that has an alpha outside of the blocks.
    """
    module = target.module(style)
    if style == "diffusers":
        return f"{module}.lora_A.weight", f"{module}.lora_B.weight", ""
    return f"{module}.lora_down.weight", f"{module}.lora_up.weight", f"{module}.alpha" if style == "kohya" else ""


def _whole_key(target: Target, style: str) -> str:
    if style != "diffusers":
        return f"{target.module(style)}.{'diff_b' if target.key.endswith('.bias') else 'diff'}"
    if target.of_linear:
        return f"{target.module(style)}.lora_B.bias"
    return f"transformer.{target.diffusers}.diff"
