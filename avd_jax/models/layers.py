"""Layers of one kind, stacked along a leading axis and applied one after the other as one compiled layer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

_HALF = (jnp.bfloat16, jnp.float16)


def scan_layers(apply: Callable, x, layers):
    """Return x after every layer.

    Args:
      apply: `(x, layer) -> x`, of the shape and dtype that x has.
      x: what goes through the layers.
      layers: pytree of parameters, each [layers ...]; `layer` is the same without that axis.

    XLA on a CPU computes in float32. It would widen half precision for all layers at once, before the loop, and so need
    three times the memory of the parameters. There each layer is widened as its turn comes.
    """

    def scanned(x, layers):
        return jax.lax.scan(lambda x, layer: (apply(x, layer), None), x, layers)[0]

    def one_at_a_time(x, layers):
        count = jax.tree.leaves(layers)[0].shape[0]

        def step(i, x):
            def turn(x):
                return apply(x, jax.tree.map(lambda leaf: leaf[i], layers))

            # The condition always holds, but the compiler moves nothing out of a branch.
            return jax.lax.cond(i < count, turn, lambda x: x, x)

        return jax.lax.fori_loop(0, count, step, x)

    if not any(leaf.dtype in _HALF for leaf in jax.tree.leaves(layers)):
        return scanned(x, layers)
    return jax.lax.platform_dependent(x, layers, cpu=one_at_a_time, default=scanned)
