"""RMS error of the transformer's velocity with weights in 8 bits, beside that of bfloat16, against float32.

    python benchmarks/low_bit.py                            # random weights at the 1.3B model's width, 6 layers
    python benchmarks/low_bit.py --weights weights/tiny     # trained weights

Computed as generation does: bfloat16 products, the residual stream in float32 (`models/low_bit.py`).
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from precision import random_inputs, random_weights

from avd_jax.convert.architectures import WAN_DIT
from avd_jax.convert.state import flat_state
from avd_jax.convert.weights import Weights, load_module, open_weights
from avd_jax.generation.low_bit import load_low_bit
from avd_jax.models.functional import denoiser
from avd_jax.models.low_bit import KINDS
from avd_jax.models.wan_dit import WanDiTConfig


class Random:
    """Random weights, as `load_low_bit` and this file read them."""

    def __init__(self, config: WanDiTConfig):
        """Draw them."""
        self.architecture, self.config = WAN_DIT, config
        self.leaves = flat_state(random_weights(config, 0))

    def arrays(self, dtypes):
        """Yield (path, array)."""
        for path, array in self.leaves.items():
            yield path, array.astype(dtypes[path])


def main() -> None:
    """Print the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights")
    for name, default in (("dim", 1536), ("ffn_dim", 8960), ("heads", 12), ("layers", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.weights:
        weights = open_weights(args.weights, WAN_DIT)
    else:
        sizes = {"dim": args.dim, "ffn_dim": args.ffn_dim, "num_heads": args.heads, "num_layers": args.layers}
        weights = Random(WanDiTConfig(**sizes, text_dim=256, text_len=64))
    inputs = random_inputs(weights.config, 0)
    exact = velocity(load_module(weights, jnp.float32), inputs)
    print(f"{args.weights or 'random weights'}, width {weights.config.dim}, {weights.config.num_layers} layers")
    for kind in ("bfloat16", *KINDS):
        found = velocity(loaded(weights, kind), inputs)
        print(f"{kind:9} {np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)):.2e}")


def loaded(weights: Weights, kind: str):
    """Return the transformer in bfloat16, its blocks' kernels as `kind` says."""
    if kind == "bfloat16":
        return load_module(weights, jnp.bfloat16)
    whole = SingleDeviceSharding(jax.devices()[0])
    return load_low_bit(weights, jnp.bfloat16, kind, lambda path, shape: whole)


def velocity(dit, inputs) -> np.ndarray:
    """Return what a transformer predicts."""
    network, params = denoiser(dit)
    return np.asarray(jax.jit(network)(params, *inputs), np.float64)


if __name__ == "__main__":
    main()
