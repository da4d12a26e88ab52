"""Adapters of low rank on the linear maps of a transformer (LoRA, arXiv 2106.09685).

    y = W x + b + (alpha / rank) B A x

W and b stay as they are; A [in rank] begins random and B [rank out] at zero, so that nothing changes at first. The two
small products are made beside the large one, not added to W: so W needs no gradient, and a change that is too small for
a bfloat16 W is not rounded away.

The parameters of an adapted network are a tree like the base's with further leaves, `blocks.self_attn.q.adapter.a`. The
base's arrays are in it as they are: no copy is made, and several networks can stand on one base.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from avd_jax.errors import UserError, closest
from avd_jax.models.linear import Projection, project
from avd_jax.shapes import Array

NAME = "adapter"  # of a layer's attribute, and so in the paths of the leaves
BLOCKS = "blocks"  # whose layers are stacked along a first axis
TARGETS = ("q", "k", "v", "o", "ffn_0", "ffn_2")  # all matrices of the blocks


@dataclass(frozen=True)
class Adapters:
    """Which layers of a transformer have an adapter, and of which size.

    Attributes:
      rank: of each.
      alpha: an adapter counts by alpha / rank, so that another rank needs no other learning rate.
      targets: names of layers, or the last parts of their dotted paths: "q", "self_attn.q", "blocks.self_attn.q".
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))

    @property
    def scale(self) -> float:
        """By which the product B A counts."""
        return self.alpha / self.rank


class AdapterParam(nnx.Param):
    """A parameter of an adapter, to tell it from the base's."""


class Adapter(nnx.Module):
    """What is added to the result of a layer: a [in rank], b [rank out], float32, both stacked as the layer is."""

    def __init__(self, layer: Projection, name: str, adapters: Adapters, rngs: nnx.Rngs):
        stacked = int(name.startswith(f"{BLOCKS}."))
        layers, self.shape = layer.kernel.shape[:stacked], layer.kernel.shape[stacked:]
        self.input_axes, self.scale = layer.input_axes, adapters.scale
        inputs, outputs = (math.prod(part) for part in self._cut(self.shape))
        if adapters.rank > min(inputs, outputs):
            raise UserError(
                f"rank={adapters.rank} is larger than {name}, a matrix of {inputs} x {outputs}, has; take "
                f"{min(inputs, outputs)} at most, or leave the layer out of lora.targets"
            )
        # Of the size that PEFT takes, so that rates found there serve here.
        init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=tuple(range(stacked)))
        self.a = AdapterParam(init(rngs.params(), (*layers, inputs, adapters.rank), jnp.float32))
        self.b = AdapterParam(jnp.zeros((*layers, adapters.rank, outputs), jnp.float32))

    def __call__(self, equation: str, x: Array, *, dtype) -> Array:
        """Return what is added to the layer's `project(equation, x, ...)`, in `dtype`."""
        x_axes, kernel_axes, axes = re.split(",|->", equation)
        (inputs, outputs), (in_shape, out_shape) = self._cut(kernel_axes), self._cut(self.shape)
        others = "".join(axis for axis in x_axes if axis not in inputs)
        down, up = self.a[...].reshape(*in_shape, -1), self.b[...].reshape(-1, *out_shape)
        hidden = project(f"{x_axes},{inputs}r->{others}r", x, down, None, dtype)
        return project(f"{others}r,r{outputs}->{axes}", self.scale * hidden, up, None, dtype)

    def _cut(self, axes):
        return axes[: self.input_axes], axes[self.input_axes :]


def add_adapters(network: nnx.Module, adapters: Adapters, rngs: nnx.Rngs) -> None:
    """Give layers of a transformer their adapters; `nnx.state(network, AdapterParam)` are their parameters.

    Raises:
      UserError: a target that no layer has, or a rank that is larger than a matrix.
    """
    layers = dict(projections(network))
    chosen = dict.fromkeys(name for target in adapters.targets for name in _named(target, layers))
    if not chosen:
        raise UserError("targets=() names no layer; take some of " + ", ".join(TARGETS))
    for name in chosen:
        setattr(layers[name], NAME, Adapter(layers[name], name, adapters, rngs))


def has_adapters(params: Mapping) -> bool:
    """Return whether adapters are among the parameters of a network."""
    return any(key == NAME or (isinstance(value, Mapping) and has_adapters(value)) for key, value in params.items())


def joined(adapters: Mapping, base: Mapping) -> dict:
    """Return the parameters of an adapted network, from those of its adapters and of its base; nothing is copied."""
    both = dict(base)
    for key, value in adapters.items():
        both[key] = joined(value, base[key]) if key in base else value
    return both


def product(a: Array, b: Array, *, scale: float, shape: tuple[int, ...]) -> Array:
    """Return what an adapter comes to as a change of the kernel, of which `shape` is, in the dtype of a and b.

    Args:
      a, b: [... in rank] and [... rank out], NumPy's or JAX's.
      scale: alpha / rank.
      shape: of the kernel, layers included.
    """
    in_numpy = isinstance(a, np.ndarray)
    made = a @ b if in_numpy else jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return (scale * made).reshape(shape)


def projections(network: nnx.Module) -> Iterator[tuple[str, Projection]]:
    """Yield (dotted name, layer) of every linear layer."""
    for path, module in nnx.iter_modules(network):
        if isinstance(module, Projection):
            yield ".".join(map(str, path)), module


def _named(target: str, layers: Mapping[str, Projection]) -> list[str]:
    found = [name for name in layers if f".{name}".endswith(f".{target}")]
    if not found:
        known = {".".join(name.split(".")[i:]) for name in layers for i in range(len(name.split(".")))}
        raise UserError(
            f"targets: no layer is called {target!r}{closest(target, known)}; there are " + ", ".join(sorted(layers))
        )
    return found
