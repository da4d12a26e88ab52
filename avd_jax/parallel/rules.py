"""Which axis of which parameter is sharded: one short ordered table, path regex -> PartitionSpec.

A path is the dotted path of a leaf, such as `generator.blocks.self_attn.q.kernel`; Adam's moments and the EMA end in
the path of their parameter and so follow the same line. A spec is aligned to the right of the leaf's shape: the layer
axis of stacked blocks stays whole.
"""

import math
import re
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from avd_jax.errors import UserError

RULES: tuple[tuple[str, P], ...] = (
    (r"\.(q|k|v)\.kernel$", P("fsdp", None, None)),  # D H K
    (r"\.o\.kernel$", P(None, None, "fsdp")),  # H K D
    (r"\.(ffn_0|text_embedding_0|time_embedding_0|time_projection_1)\.kernel$", P("fsdp", None)),
    (r"\.(ffn_2|text_embedding_2|time_embedding_2|patch_embedding)\.kernel$", P(None, "fsdp")),
    (r"\.head\.head\.kernel$", P("fsdp", None)),
    (r"\.((enc|dec)\d\.conv|upconv\d)\.kernel$", P(None, None, None, "fsdp")),  # of the interpolator, output last
    (r"\.(bias|scale|modulation)$", P()),
)
LARGE_LEAF = 1 << 20  # elements; smaller leaves that no rule matches are replicated


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Return the spec of one leaf, filled up with None on the left.

    An axis that the mesh does not divide is left whole where the leaf is small.

    Raises:
      UserError: a large leaf that no rule matches, or that the mesh does not divide.
    """
    spec = next((spec for pattern, spec in RULES if re.search(pattern, "." + path)), None)
    if spec is None:
        if math.prod(shape) >= LARGE_LEAF:
            raise UserError(f"no sharding rule matches {path} {shape}; add a line to avd_jax/parallel/rules.py")
        return P()
    axes = (None,) * (len(shape) - len(spec)) + tuple(spec)
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            if math.prod(shape) >= LARGE_LEAF:
                raise UserError(f"{path} {shape}: {size} is not divisible by mesh axis {axis}={mesh.shape[axis]}")
            return P()
    return P(*axes)


def shardings(leaves: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh) -> dict[str, NamedSharding]:
    """Return the sharding of every leaf of a flat {path: leaf} mapping."""
    return {path: NamedSharding(mesh, spec_for(path, leaf.shape, mesh)) for path, leaf in leaves.items()}


def tree_shardings(tree, mesh: Mesh):
    """Return a tree of the same structure with the sharding of every leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: NamedSharding(mesh, spec_for(dotted(keys), leaf.shape, mesh)), tree
    )


def dotted(keys) -> str:
    """Join the keys of a JAX tree path with dots."""
    return jax.tree_util.keystr(keys, simple=True, separator=".")
