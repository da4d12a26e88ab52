"""What half-rate steps save: work by count at full size, and time measured at a size where attention dominates.

    python benchmarks/half_rate.py

The count is that of a 1.3B student's 4 steps at 21x60x104 latents, 2 of them at half rate, interpolator included. The
measurement runs a transformer of a quarter of the 1.3B's widths with few layers, both rates alternately, and takes the
median ratio; attention is then more than half of the work from some 3,000 tokens on.
"""

import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

from avd_jax.capacity.flops import count_flops
from avd_jax.generation.pipeline import HalfRateSampling, StudentSampler, sample_keys
from avd_jax.models.functional import denoiser
from avd_jax.models.interpolator import Interpolator, InterpolatorConfig
from avd_jax.models.wan_dit import WAN_1_3B, WanDiT, WanDiTConfig

PAIRS = flags.DEFINE_integer("pairs", 3, "Measured pairs, after one to warm up.")
LAYERS = flags.DEFINE_integer("layers", 2, "Layers of the measured transformer.")
FRAMES = flags.DEFINE_integer("frames", 21, "Latent frames of the measured clip, odd.")
HEIGHT = flags.DEFINE_integer("height", 24, "Height of its latents, even.")
WIDTH = flags.DEFINE_integer("width", 40, "Width of its latents, even.")

TIMESTEPS = (1000.0, 900.0, 757.0, 522.0)
HALF_RATE_STEPS = 2


def dit(config: WanDiTConfig, dtype) -> WanDiT:
    """Return a transformer with random weights."""
    return WanDiT(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)


def conditions(config: WanDiTConfig, dtype) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shape of what the transformer is told of a prompt."""
    return {"prompt_embeds": jax.ShapeDtypeStruct((1, config.text_len, config.text_dim), dtype)}


def count(config: WanDiTConfig, shape: tuple[int, int, int, int], interpolator: InterpolatorConfig) -> dict[str, float]:
    """Return the FLOPs of one step at each rate, of the interpolation, and of the whole generation with and without."""
    network, params = denoiser(nnx.eval_shape(partial(dit, config, jnp.bfloat16)))
    frames, *rest = shape
    half_shape = ((frames + 1) // 2, *rest)
    text = conditions(config, jnp.bfloat16)
    timestep = jax.ShapeDtypeStruct((1,), jnp.float32)

    def step(latents_shape):
        return count_flops(network, params, jax.ShapeDtypeStruct((1, *latents_shape), jnp.float32), timestep, text)

    graphdef, weights = nnx.split(nnx.eval_shape(lambda: Interpolator(interpolator, nnx.Rngs(0))))
    unet = count_flops(
        lambda weights, latents: nnx.merge(graphdef, weights)(latents),
        weights,
        jax.ShapeDtypeStruct((1, *half_shape), jnp.float32),
    )
    full, half = step(shape), step(half_shape)
    steps = len(TIMESTEPS)
    with_half = HALF_RATE_STEPS * half + unet + (steps - HALF_RATE_STEPS) * full
    return {"full": full, "half": half, "unet": unet, "with": with_half, "without": steps * full}


def seconds(function, *args) -> float:
    """Return how long one call takes, result included."""
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def measure() -> tuple[list[float], list[float]]:
    """Return the ratios of time, half to full rate, pair by pair: of one step, and of the whole generation."""
    config = WanDiTConfig(dim=384, ffn_dim=2240, num_heads=3, num_layers=LAYERS.value)
    network, params = denoiser(dit(config, jnp.float32))
    shape = (FRAMES.value, HEIGHT.value, WIDTH.value, config.in_dim)
    text = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), conditions(config, jnp.float32))
    step = jax.jit(network)
    full, half = (jnp.zeros((1, frames, *shape[1:])) for frames in (shape[0], (shape[0] + 1) // 2))
    unet = Interpolator(InterpolatorConfig(config.in_dim), nnx.Rngs(0))
    half_rate = HalfRateSampling(HALF_RATE_STEPS, "consecutive", unet)
    samplers = [StudentSampler(network, shape, timesteps=TIMESTEPS, half_rate=option) for option in (half_rate, None)]
    keys, timestep = sample_keys([0]), jnp.full(1, 500.0)
    step_ratios, ratios = [], []
    for _ in range(PAIRS.value + 1):
        steps = [seconds(step, params, latents, timestep, text) for latents in (half, full)]
        whole = [seconds(sampler, params, keys, text) for sampler in samplers]
        step_ratios.append(steps[0] / steps[1])
        ratios.append(whole[0] / whole[1])
        print(f"  step {steps[0]:.2f} / {steps[1]:.2f} s, generation {whole[0]:.2f} / {whole[1]:.2f} s", flush=True)
    return step_ratios[1:], ratios[1:]


def main(_) -> None:
    """Print both."""
    found = count(WAN_1_3B, (21, 60, 104, 16), InterpolatorConfig(widths=(64, 128, 256)))
    tera = {name: f"{value / 1e12:.1f}" for name, value in found.items()}
    print(
        f"1.3B, 21x60x104, TFLOP: full step {tera['full']}, half-rate step {tera['half']}, interpolator {tera['unet']}"
    )
    print(f"half-rate step / full step: {found['half'] / found['full']:.3f}")
    print(f"4 steps with interpolation / without: {found['with'] / found['without']:.3f}")
    tokens = FRAMES.value * HEIGHT.value * WIDTH.value // 4
    size = f"{LAYERS.value} layers of a quarter of 1.3B's widths, {tokens} tokens"
    print(f"measured, {size}, half rate / full rate, after a warm-up:")
    for name, ratios in zip(("step", "generation"), measure(), strict=True):
        print(f"{name}: {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")


if __name__ == "__main__":
    app.run(main)
