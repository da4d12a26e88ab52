"""What identifies a network's weights, in whatever layout they are stored."""

import hashlib
import itertools
import math

import numpy as np

from avd_jax.convert.adapted import AdaptedWeights
from avd_jax.convert.weights import Weights

# A fine-tune changes nearly every leaf, but one merged from low-rank factors may change attention only.
_TELLING_LEAF = "blocks.self_attn.q.kernel"
_SMALL_LEAF = 1 << 20  # elements
_MOST_LEAVES = 32
_MOST_VALUES = 1 << 20


def fingerprint(weights: Weights, telling_leaf: str = _TELLING_LEAF) -> str:
    """Return a short text that identifies a network's weights, in whatever layout they are stored, read from a few.

    Adapters that are merged into them count by their files. `telling_leaf` is the path of a large leaf that is read
    too, if there is one.
    """
    if isinstance(weights, AdaptedWeights):
        parts = [fingerprint(weights.base, telling_leaf), *(adapter.fingerprint for adapter in weights.adapters)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
    small = sorted(path for path, leaf in weights.leaves.items() if math.prod(leaf.shape) <= _SMALL_LEAF)
    chosen = small[:: math.ceil(len(small) / _MOST_LEAVES) or 1]
    found = weights.arrays(paths=chosen)  # small ones together, which is faster than each by itself
    if telling_leaf in weights.leaves and telling_leaf not in chosen:
        found = itertools.chain(found, weights.arrays(paths=[telling_leaf]))
    digest = hashlib.sha256()
    for path, array in found:
        digest.update(f"{path} {array.shape} {array.dtype}".encode())
        values = array.reshape(-1)
        digest.update(np.ascontiguousarray(values[:: math.ceil(values.size / _MOST_VALUES) or 1]).tobytes())
    return digest.hexdigest()[:16]
