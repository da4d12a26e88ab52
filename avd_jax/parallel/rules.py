"""Which axis of which parameter is sharded: one short ordered table, path regex -> PartitionSpec.

A path is the dotted path of a leaf, such as `generator.blocks.self_attn.q.kernel`; Adam's moments and the EMA end in
the path of their parameter and so follow the same line. A spec is aligned to the right of the leaf's shape: the layer
axis of stacked blocks stays whole. Parameters are cut over `fsdp` and `seq` together, since each device needs a layer's
whole parameters only while it computes that layer.
"""

import math
import re
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from avd_jax.errors import UserError
from avd_jax.parallel.mesh import PARAMETER_AXES

RULES: tuple[tuple[str, P], ...] = (
    (r"\.(q|k|v)\.kernel$", P(PARAMETER_AXES, None, None)),  # D H K
    (r"\.o\.kernel$", P(None, None, PARAMETER_AXES)),  # H K D
    (r"\.(ffn_0|text_embedding_0|time_embedding_0|time_projection_1)\.kernel$", P(PARAMETER_AXES, None)),
    (r"\.(ffn_2|text_embedding_2|time_embedding_2|patch_embedding)\.kernel$", P(None, PARAMETER_AXES)),
    (r"\.head\.head\.kernel$", P(PARAMETER_AXES, None)),
    (
        r"\.((enc|dec)\d\.conv|upconv\d)\.kernel$",
        P(None, None, None, PARAMETER_AXES),
    ),  # interpolator
    (r"\.values$", P(PARAMETER_AXES, None)),  # of a kernel in 8 bits
    (r"\.adapter\.a$", P(PARAMETER_AXES, None)),  # in rank
    (r"\.adapter\.b$", P(None, PARAMETER_AXES)),  # rank out
    (r"\.(bias|scale|modulation)$", P()),
)
LARGE_LEAF = 1 << 20  # elements; smaller leaves that no rule matches are replicated


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Return the spec of one leaf, filled up with None on the left.

    If the mesh does not divide the axis that the rule names, the largest other axis of the rule that it does divide
    is cut; if there is none, a small leaf stays whole.

    Raises:
      UserError: a large leaf that no rule matches, or of which the mesh divides no axis.
    """
    large = math.prod(shape) >= LARGE_LEAF
    spec = _rule(path)
    if spec is None:
        if large:
            raise UserError(f"no sharding rule matches {path} {shape}; add a line to avd_jax/parallel/rules.py")
        return P()
    if not any(spec):
        return P(*(None,) * len(shape))
    shards = math.prod(mesh.shape[axis] for axis in PARAMETER_AXES)
    named = spec.index(PARAMETER_AXES) - len(spec)  # axes from the right
    others = sorted((axis for axis in range(-len(spec), 0) if axis != named), key=lambda axis: -shape[axis])
    for axis in (named, *others):
        if shape[axis] % shards == 0:
            return P(*(PARAMETER_AXES if i - len(shape) == axis else None for i in range(len(shape))))
    if large:
        sizes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in PARAMETER_AXES)
        raise UserError(f"{path} {shape}: no axis can be cut into {sizes}={shards} parts; set config.mesh to fit")
    return P()


def cut_axis(path: str, shape: tuple[int, ...]) -> int | None:
    """Return the axis of one leaf that a mesh cuts unless its size forbids it; None if the leaf stays whole."""
    spec = _rule(path)
    return len(shape) + spec.index(PARAMETER_AXES) - len(spec) if spec and any(spec) else None


def _rule(path: str) -> P | None:
    return next((spec for pattern, spec in RULES if re.search(pattern, "." + path)), None)


def shardings(leaves: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh) -> dict[str, NamedSharding]:
    """Return the sharding of every leaf of a flat {path: leaf} mapping."""
    return {path: NamedSharding(mesh, spec_for(path, leaf.shape, mesh)) for path, leaf in leaves.items()}


def tree_shardings(tree, mesh: Mesh):
    """Return a tree of the same structure with the sharding of every leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: NamedSharding(mesh, spec_for(dotted(keys), leaf.shape, mesh)), tree
    )


def sharding_table(tree) -> str:
    """Return one line for each large leaf of a tree of sharded arrays: path, shape, spec, MiB a device."""
    rows = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if math.prod(leaf.shape) >= LARGE_LEAF:
            local = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            cut = " x ".join("+".join(axes) if isinstance(axes, tuple) else axes or "-" for axes in leaf.sharding.spec)
            rows.append((dotted(keys), " x ".join(map(str, leaf.shape)), cut, f"{local / 2**20:.1f} MiB"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{n}}" for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows)


def dotted(keys) -> str:
    """Join the keys of a JAX tree path with dots."""
    return jax.tree_util.keystr(keys, simple=True, separator=".")
