"""Flat views of an nnx state: leaves by dotted path, the names that the conversion tables use."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx


def flat_state(state) -> dict[str, Any]:
    """Return dotted path -> leaf of an nnx state or of its pure dict (nested, as in a checkpoint)."""
    pure = state if isinstance(state, dict) else nnx.to_pure_dict(state)
    leaves, _ = jax.tree_util.tree_flatten_with_path(pure)
    return {".".join(str(entry.key) for entry in path): leaf for path, leaf in leaves}


def from_flat(state, flat: Mapping[str, Any]):
    """Fill an nnx state (often abstract) with the leaves of `flat`, which has exactly its paths; returns the state."""
    pure = nnx.to_pure_dict(state)
    leaves, structure = jax.tree_util.tree_flatten_with_path(pure)
    paths = [".".join(str(entry.key) for entry in path) for path, _ in leaves]
    if set(paths) != set(flat):
        raise AssertionError(f"leaves differ: {sorted(set(paths) ^ set(flat))}")
    nnx.replace_by_pure_dict(state, jax.tree_util.tree_unflatten(structure, [flat[path] for path in paths]))
    return state


def nested(flat: Mapping[str, Any]) -> dict:
    """Return the nested dict of dotted paths, the form in which Orbax stores leaves."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
