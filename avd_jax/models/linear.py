"""The linear layers of the transformers: products in a compute dtype, gradients of the weights summed in float32.

JAX gives a weight's gradient the dtype of the product, so with bfloat16 the devices' shares would be rounded before
they are added up, and added up in bfloat16. Wan's and AVD's trainings reduce in float32 (FSDP's `reduce_dtype`).
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import SymbolicZero, linear_call
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avd_jax.models.placement import Placement
from avd_jax.shapes import Array


@dataclass(frozen=True)
class Stages:
    """How devices that share examples and tokens sum a kernel's gradient: over the first axis, then over the second.

    A TPU's compiler has a sum over all devices of a square slice, such as 4x4 or 8x8, arrive whole on each of them,
    which takes twice the traffic of a sum of which each gets its part, and room for the whole. Over one axis at a time
    it does not, and the second sum is of parts.

    Attributes:
      mesh: of the devices.
      batch_axis, token_axis: of the mesh. They cut the kernel, in this order.
      cut: the kernel's axis that they cut, from the right.
    """

    mesh: Mesh
    batch_axis: str
    token_axis: str
    cut: int

    @classmethod
    def of(cls, placement: Placement, examples: int, tokens: int, kernel: tuple[int, ...], cut: int) -> "Stages | None":
        """Return them for a kernel of a shape, or None where one sum is as good or the mesh does not divide them."""
        if not placement.on_tpu or placement.sequence_shards == 1:
            return None
        *others, batch_axis = placement.batch_axes
        shards = placement.mesh.shape[batch_axis]
        if shards == 1 or any(placement.mesh.shape[axis] > 1 for axis in others):
            return None
        token_shards = placement.sequence_shards
        parts = (examples, shards), (tokens, token_shards), (kernel[cut], shards * token_shards)
        if any(size % number for size, number in parts):
            return None
        return cls(placement.mesh, batch_axis, placement.sequence_axis, cut)

    def summed(self, equation: str, x: Array, slope: Array, token_axes: tuple[int, int]) -> Array:
        """Return `einsum(equation, x, slope)` in float32; the token axes are those of x and slope."""
        shards = self.mesh.shape[self.token_axis]
        (x_axes, axes), kernel_axes = equation.split("->")[0].split(","), equation.split("->")[1]
        token, new = x_axes[token_axes[0]], "s"

        def apart(array: Array, axis: int) -> Array:
            size = array.shape[axis]
            return array.reshape(*array.shape[:axis], shards, size // shards, *array.shape[axis + 1 :])

        x_axes, axes = (text.replace(token, new + token) for text in (x_axes, axes))
        x, slope = (apart(array, axis) for array, axis in zip((x, slope), token_axes, strict=True))
        parts = einsum(f"{x_axes},{axes}->{new}{kernel_axes}", x, slope, preferred_element_type=jnp.float32)
        parts = self._placed(parts, self.batch_axis, self.token_axis)
        return self._placed(jnp.sum(parts, axis=0), (self.batch_axis, self.token_axis))

    def _placed(self, array: Array, cut: str | tuple[str, ...], *leading: str) -> Array:
        spec = [*leading, *(None for _ in range(array.ndim - len(leading)))]
        spec[self.cut] = cut
        return jax.lax.with_sharding_constraint(array, NamedSharding(self.mesh, PartitionSpec(*spec)))


def project(
    equation: str, x: Array, kernel: Array, bias: Array | None, dtype, *, stages: Stages | None = None
) -> Array:
    """Return `einsum(equation, x, kernel) + bias` in `dtype`.

    Args:
      equation: such as "bnd,dhk->bhnk"; what is not contracted of the kernel is the bias's axes.
      x: input, in any dtype.
      kernel: weights, in any dtype.
      bias: added along the axes that the result shares with it; None: nothing.
      dtype: of the product, its inputs and the sum. With float32 it is exact on every device: a TPU or GPU would
        otherwise round the inputs to fewer digits.
      stages: in which devices sum the kernel's gradient; None: in one.
    """
    return _project(equation, jnp.dtype(dtype), stages, x, kernel, bias)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _project(equation, dtype, stages, x, kernel, bias):
    product = einsum(equation, x.astype(dtype), kernel.astype(dtype))
    return product if bias is None else product + _along(equation, bias.astype(dtype))


def _project_jvp(equation, dtype, stages, primals, tangents):
    x, kernel, bias = primals
    x_tangent, kernel_tangent, bias_tangent = tangents
    (x_axes, kernel_axes), axes = equation.split("->")[0].split(","), equation.split("->")[1]
    bias_axes = "".join(axis for axis in kernel_axes if axis in axes)

    output = _project(equation, dtype, stages, x, kernel, bias)
    change = jnp.zeros_like(output)

    def of_kernel(x, kernel):
        return einsum(equation, x, kernel.astype(dtype))

    def kernel_gradient(x, slope):
        product = f"{x_axes},{axes}->{kernel_axes}"
        if stages is not None:
            gradient = stages.summed(product, x, slope, _token_axes(equation))
        else:
            gradient = einsum(product, x, slope, preferred_element_type=jnp.float32)
        return gradient.astype(kernel.dtype)

    def of_bias(_, bias):
        return jnp.broadcast_to(_along(equation, bias.astype(dtype)), output.shape)

    def bias_gradient(_, slope):
        summed = tuple(i for i, axis in enumerate(axes) if axis not in bias_axes)
        return jnp.sum(slope, summed, dtype=jnp.float32).astype(bias.dtype)

    if type(x_tangent) is not SymbolicZero:  # as that of the model's own inputs is: their gradient would cost a product
        change += einsum(equation, x_tangent.astype(dtype), kernel.astype(dtype))
    if type(kernel_tangent) is not SymbolicZero:
        change += linear_call(of_kernel, kernel_gradient, x.astype(dtype), kernel_tangent)
    if bias is not None and type(bias_tangent) is not SymbolicZero:
        change += linear_call(of_bias, bias_gradient, (), bias_tangent)
    return output, change


_project.defjvp(_project_jvp, symbolic_zeros=True)


def gated_project(
    equation: str, x: Array, kernel: Array, bias: Array, gate: Array, dtype, mesh: Mesh | None = None
) -> Array:
    """Return `project(equation, x, kernel, bias, dtype) * gate`, in float32, without computing it again for gradients.

    The gate's gradient follows from the kernel's, as long as that is apart for each example: with P = x^T slope it is
    the sum over the inputs of kernel * P, and the kernel's is P * gate.

    Args:
      equation: such as "bnf,fd->bnd", the result [B N D].
      x, kernel, bias, dtype: as in `project`.
      gate: [B D].
      mesh: over which the kernel may be cut, or None.
    """
    return _gated(equation, jnp.dtype(dtype), mesh, x, kernel, bias, gate)


def _plainly_gated(equation, dtype, x, kernel, bias, gate):
    # A product of its own: else the TPU compiler makes the float32 stream part of it.
    product = jax.lax.optimization_barrier(_project(equation, dtype, None, x, kernel, bias))
    return product.astype(jnp.float32) * gate[:, None]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _gated(equation, dtype, mesh, x, kernel, bias, gate):
    return _plainly_gated(equation, dtype, x, kernel, bias, gate)


def _gated_jvp(equation, dtype, mesh, primals, tangents):
    moving = [type(tangent) is not SymbolicZero for tangent in tangents]

    def plain(*moved):
        given = iter(moved)
        return _plainly_gated(equation, dtype, *(next(given) if m else x for m, x in zip(moving, primals, strict=True)))

    def change(_, tangents):
        return jax.jvp(plain, primals, tangents)[1]

    def gradients(kept, slope):
        x, kernel, bias, gate = kept
        (x_axes, kernel_axes), axes = equation.split("->")[0].split(","), equation.split("->")[1]
        inputs = tuple(range(1, kernel.ndim))  # the kernel's axes but the last, behind the batch
        total = jnp.sum(slope, axis=1)
        # Written once, in the dtype of the products; they would be slower with the float32 slope as an operand.
        bare = slope.astype(dtype), (slope * gate[:, None]).astype(dtype)
        bare, gated = jax.lax.optimization_barrier(bare)
        kernel16 = kernel.astype(dtype)
        if mesh is not None:  # gathered here for both uses, else once more and in float32 for the sum
            kernel16 = jax.lax.with_sharding_constraint(kernel16, NamedSharding(mesh, PartitionSpec()))
        apart = einsum(
            f"{x_axes},{axes}->{axes[0]}{kernel_axes}", x.astype(dtype), bare, preferred_element_type=jnp.float32
        )
        return (
            einsum(f"{axes},{kernel_axes}->{x_axes}", gated, kernel16).astype(x.dtype),
            jnp.sum(apart * jnp.expand_dims(gate, inputs), axis=0).astype(kernel.dtype),
            jnp.sum(total * gate, axis=0).astype(bias.dtype),
            jnp.sum(apart * kernel16.astype(jnp.float32), axis=inputs) + bias.astype(jnp.float32) * total,
        )

    if not all(moving):
        return jax.jvp(plain, *([x for m, x in zip(moving, side, strict=True) if m] for side in (primals, tangents)))
    output = _gated(equation, dtype, mesh, *primals)
    return output, linear_call(change, gradients, tuple(primals), tuple(tangents))


_gated.defjvp(_gated_jvp, symbolic_zeros=True)


def einsum(equation: str, one: Array, other: Array, **options) -> Array:
    """Return `jnp.einsum` of two arrays of a dtype; of float32 with all its digits."""
    exact = one.dtype == jnp.float32
    return jnp.einsum(equation, one, other, precision=jax.lax.Precision.HIGHEST if exact else None, **options)


def _token_axes(equation):
    """Return the axis of the input and that of the result behind the batch that is not the kernel's."""
    inputs, axes = equation.split("->")
    tokens = [axis for axis in axes if axis not in inputs.split(",")[1]][1]
    return inputs.index(tokens), axes.index(tokens)


def _along(equation, bias):
    """Return a bias with an axis of size 1 for each axis of the result that is not its own."""
    inputs, axes = equation.split("->")
    own = [axis in inputs.split(",")[1] for axis in axes]
    shape = [bias.shape[sum(own[:i])] if mine else 1 for i, mine in enumerate(own)]
    return bias.reshape(shape)


class Projection(nnx.Module):
    """A linear map with a bias; what the layers of the transformers have in common.

    Attributes:
      kernel, bias: weights, in any dtype.
      dtype: of the product.
      input_axes: how many of the kernel's first axes are summed over.
      cut: the kernel's axis that a mesh cuts (`parallel/rules.py`), from the right.
      values, scale: stand for the kernel, which is None, if it is in 8 bits (`models/low_bit.py`): a matrix [in out],
        or [out in] if the outputs are heads, and the scale of each output.
      adapter: a correction of low rank (`models/adapters.py`), or None.
    """

    input_axes = 1
    cut: int

    def __init__(self, shape: tuple[int, ...], *, rngs: nnx.Rngs, dtype, param_dtype):
        axes = range(len(shape))
        init = nnx.initializers.lecun_normal(axes[: self.input_axes], axes[self.input_axes :])
        self.kernel = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros(shape[self.input_axes :], param_dtype))
        self.dtype = dtype
        self.values = self.scale = self.adapter = nnx.data(None)

    def apply(self, equation: str, x: Array, gate: Array | None = None, placement: Placement | None = None) -> Array:
        """Return `project(equation, x, ...)` with the layer's weights, and what its adapter adds.

        With a gate [B D], of a result [B N D], times that in float32. The placement is of devices that may share the
        examples and tokens of x.
        """
        if gate is not None and self.values is None and self.adapter is None:
            mesh = placement.mesh if placement else None
            return gated_project(equation, x, self.kernel[...], self.bias[...], gate, self.dtype, mesh)
        if self.values is None:
            tokens = _token_axes(equation)[0] if placement else None
            stages = placement and Stages.of(placement, x.shape[0], x.shape[tokens], self.kernel.shape, self.cut)
            y = project(equation, x, self.kernel[...], self.bias[...], self.dtype, stages=stages)
        else:
            y = self._from_values(equation, x)
        y = y if self.adapter is None else y + self.adapter(equation, x, dtype=self.dtype)
        return y if gate is None else jax.lax.optimization_barrier(y).astype(jnp.float32) * gate[:, None]

    def _from_values(self, equation: str, x: Array) -> Array:
        (x_axes, kernel_axes), axes = equation.split("->")[0].split(","), equation.split("->")[1]
        inputs, outputs = kernel_axes[: self.input_axes], kernel_axes[self.input_axes :]
        if len(outputs) > 1:
            kernel_axes = outputs + inputs
        sizes = dict(zip(x_axes, x.shape, strict=True)) | dict(zip(outputs, self.scale.shape, strict=True))
        # Else the TPU compiler works on the values of all layers at once, before the loop over them.
        values = jax.lax.optimization_barrier(self.values[...])
        kernel = values.reshape([sizes[axis] for axis in kernel_axes])
        y = project(f"{x_axes},{kernel_axes}->{axes}", x, kernel, None, self.dtype)
        y = y * _along(equation, self.scale[...])
        return (y + _along(equation, self.bias[...])).astype(self.dtype)


class Linear(Projection):
    """Linear map of the last axis: kernel [D F], bias [F]; see `project`."""

    def __init__(self, in_dim: int, out_dim: int, *, rngs: nnx.Rngs, dtype, param_dtype, cut: int = -2):
        super().__init__((in_dim, out_dim), rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.cut = cut

    def __call__(self, x: Array, *, gate: Array | None = None, placement: Placement | None = None) -> Array:
        """Return [... F] for x [... D]; with a gate [B F], and x [B N D], as `gated_project` does."""
        axes = "abceg"[: x.ndim - 1]
        return self.apply(f"{axes}d,df->{axes}f", x, gate, placement)
