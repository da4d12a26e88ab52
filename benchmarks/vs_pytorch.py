"""Our networks against diffusers and transformers on this machine's CPU: same weights, same inputs, float32, one run.

    make parity                                  # sets up .venv-parity
    .venv-parity/bin/python benchmarks/vs_pytorch.py

Both sides run in turn, ours then PyTorch's, on all cores. A row gives the median seconds of each, the median of the
ratios ours / PyTorch's pair by pair with their range (the ratio is what to quote: a noisy machine slows both), how far
the outputs differ relative to their RMS, and the GFLOPs of products and convolutions, counted in our program, a second
on each side. The first line has what a product of two matrices alone reaches on each side, for comparison. Sizes: the
transformer has the width of Wan2.1-1.3B, the text encoder that of umT5-XXL, both with a few layers; the autoencoder is
whole.
"""

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl import app, flags
from einops import rearrange
from flax import nnx

from avd_jax.capacity.flops import count_flops
from avd_jax.convert import flat_state, from_flat
from avd_jax.convert.architectures import UMT5, WAN_DIT, WAN_VAE, Architecture
from avd_jax.convert.engine import leaves_from_torch, resolve
from avd_jax.models.umt5 import UMT5Config
from avd_jax.models.wan_dit import WAN_1_3B
from avd_jax.models.wan_vae import WanVAEConfig

CASES = flags.DEFINE_list("cases", ["dit", "dit_backward", "vae_encode", "vae_decode", "umt5"], "which rows to measure")
PAIRS = flags.DEFINE_integer("pairs", 7, "timed pairs a row, after one warm-up of each side", lower_bound=1)
LAYERS = flags.DEFINE_integer("layers", 2, "layers of the transformer and of the text encoder", lower_bound=1)
LATENTS = flags.DEFINE_list("latents", ["3", "32", "68"], "latent frames, height and width of the transformer's input")
VIDEO = flags.DEFINE_list("video", ["9", "128", "128"], "frames, height and width of the autoencoder's clip")
SQUARE = 2048  # rows and columns of the matrices whose product shows what a side reaches


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: both sides as functions without arguments that return a NumPy array once they are done; its FLOPs."""

    name: str
    ours: Callable[[], np.ndarray]
    theirs: Callable[[], np.ndarray]
    flops: float


def main(argv):
    """Measure the rows that were asked for and print the table."""
    del argv
    torch.manual_seed(0)
    print(
        f"{_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}; jax {jax.__version__}, "
        f"torch {torch.__version__} ({torch.get_num_threads()} threads), diffusers {diffusers.__version__}, "
        f"transformers {transformers.__version__}"
    )
    rates = ", ".join(f"{name} {2 * SQUARE**3 / seconds / 1e9:.0f}" for name, seconds in square_product().items())
    print(f"A product of {SQUARE} x {SQUARE} matrices alone, GFLOP/s: {rates}\n")
    print(
        "| case | ours, s | PyTorch, s | ratio (range) | difference | GFLOP/s: ours, PyTorch |\n"
        "| --- | --- | --- | --- | --- | --- |",
        flush=True,
    )
    makers = {
        "dit": dit,
        "dit_backward": dit_backward,
        "vae_encode": vae_encode,
        "vae_decode": vae_decode,
        "umt5": umt5,
    }
    for name in CASES.value:
        if name not in makers:
            raise app.UsageError(f"--cases: {name!r} is none of {', '.join(makers)}")
        measure(makers[name]())


def measure(case: Case) -> None:
    """Time one case in alternating pairs and print its row."""
    ours, theirs = case.ours(), case.theirs()
    difference = np.abs(ours - theirs).max() / np.sqrt(np.mean(np.square(theirs)))
    pairs = [(_seconds(case.ours), _seconds(case.theirs)) for _ in range(PAIRS.value)]
    ratios = [a / b for a, b in pairs]
    seconds = [statistics.median(side) for side in zip(*pairs, strict=True)]
    print(
        f"| {case.name} | {seconds[0]:.3f} | {seconds[1]:.3f} | "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | {difference:.1e} | "
        + ", ".join(f"{case.flops / side / 1e9:.0f}" for side in seconds)
        + " |",
        flush=True,
    )


def square_product() -> dict[str, float]:
    """Return the seconds that a product of two square matrices takes on each side, the best of several."""
    one = np.random.default_rng(0).standard_normal((SQUARE, SQUARE)).astype(np.float32)
    ours, theirs, product = jnp.asarray(one), torch.from_numpy(one), jax.jit(jnp.matmul)
    sides = {"ours": lambda: np.asarray(product(ours, ours)), "PyTorch": lambda: (theirs @ theirs).numpy()}
    return {name: min(_seconds(side) for _ in range(2 * PAIRS.value + 1)) for name, side in sides.items()}


def dit() -> Case:
    """Forward pass of the transformer."""
    model, (graphdef, state), inputs, name = _dit()
    forward = jax.jit(lambda state, *arrays: nnx.merge(graphdef, state)(*arrays))
    arrays = _dit_arrays(inputs)

    def theirs():
        with torch.no_grad():
            return rearrange(model(*inputs).sample.numpy(), "b c f h w -> b f h w c")

    flops = count_flops(forward, state, *arrays)
    return Case(f"DiT forward, {name}", lambda: np.asarray(forward(state, *arrays)), theirs, flops)


def dit_backward() -> Case:
    """Forward and backward pass of the transformer: the gradient of mean(velocity^2) in all parameters."""
    model, (graphdef, state), inputs, name = _dit()
    arrays = _dit_arrays(inputs)
    gradient = jax.jit(jax.grad(lambda state, *arrays: jnp.mean(nnx.merge(graphdef, state)(*arrays) ** 2)))

    def ours():
        grads = jax.block_until_ready(gradient(state, *arrays))
        return np.asarray(grads["head"]["head"]["kernel"][...]).T

    def theirs():
        model.zero_grad()
        model(*inputs).sample.square().mean().backward()
        return model.proj_out.weight.grad.numpy()

    return Case(f"DiT forward and backward, {name}", ours, theirs, count_flops(gradient, state, *arrays))


def vae_encode() -> Case:
    """Video to latents."""
    model, (graphdef, state), video, name = _vae()
    encode = jax.jit(lambda state, video: nnx.merge(graphdef, state).encode(video))
    channels_last = np.asarray(rearrange(video.numpy(), "b c f h w -> b f h w c"))
    mean, std = (np.asarray(getattr(model.config, f"latents_{name}")) for name in ("mean", "std"))

    def theirs():
        with torch.no_grad():
            latents = model.encode(video).latent_dist.mode().numpy()
        return (rearrange(latents, "b c f h w -> b f h w c") - mean) / std

    flops = count_flops(encode, state, channels_last)
    return Case(f"VAE encode, {name}", lambda: np.asarray(encode(state, channels_last)), theirs, flops)


def vae_decode() -> Case:
    """Latents to video; diffusers clips what it returns, so both are compared clipped."""
    model, (graphdef, state), video, name = _vae()
    decode = jax.jit(lambda state, latents: jnp.clip(nnx.merge(graphdef, state).decode(latents), -1, 1))
    with torch.no_grad():
        latents = model.encode(video).latent_dist.mode()
    mean, std = (np.asarray(getattr(model.config, f"latents_{name}"), np.float32) for name in ("mean", "std"))
    normalised = (rearrange(latents.numpy(), "b c f h w -> b f h w c") - mean) / std

    def theirs():
        with torch.no_grad():
            return rearrange(model.decode(latents).sample.numpy(), "b c f h w -> b f h w c")

    flops = count_flops(decode, state, normalised)
    return Case(f"VAE decode, {name}", lambda: np.asarray(decode(state, normalised)), theirs, flops)


def umt5() -> Case:
    """512 tokens through the text encoder; the embedding table is small, since only its rows' width matters."""
    config = UMT5Config(vocab_size=1024, num_layers=LAYERS.value)
    model = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=config.vocab_size,
            d_model=config.dim,
            d_ff=config.ffn_dim,
            d_kv=config.head_dim,
            num_heads=config.num_heads,
            num_layers=config.num_layers,
            feed_forward_proj="gated-gelu",
        )
    ).eval()
    graphdef, state = _same_weights(UMT5, config, model, skip=("encoder.embed_tokens.weight",))
    encode = jax.jit(lambda state, ids, mask: nnx.merge(graphdef, state)(ids, mask))
    ids = np.random.default_rng(0).integers(2, config.vocab_size, (1, 512)).astype(np.int32)
    mask = np.ones_like(ids)

    def theirs():
        with torch.no_grad():
            return model(torch.from_numpy(ids).long(), torch.from_numpy(mask)).last_hidden_state.numpy()

    name = f"XXL width, {config.num_layers} layers, 512 tokens"
    flops = count_flops(encode, state, ids, mask)
    return Case(f"umT5, {name}", lambda: np.asarray(encode(state, ids, mask)), theirs, flops)


def _dit():
    config = dataclasses.replace(WAN_1_3B, num_layers=LAYERS.value)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
    ).eval()
    frames, height, width = map(int, LATENTS.value)
    inputs = (
        torch.randn(1, config.in_dim, frames, height, width),
        torch.tensor([757.0]),
        torch.randn(1, config.text_len, config.text_dim),
    )
    name = f"1.3B width, {config.num_layers} layers, {frames * height * width // 4} tokens"
    return model, _same_weights(WAN_DIT, config, model), inputs, name


def _dit_arrays(inputs):
    latents, timestep, prompt_embeds = (tensor.numpy() for tensor in inputs)
    return jnp.asarray(rearrange(latents, "b c f h w -> b f h w c")), jnp.asarray(timestep), jnp.asarray(prompt_embeds)


def _vae():
    model = diffusers.AutoencoderKLWan().eval()
    frames, height, width = map(int, VIDEO.value)
    video = torch.randn(1, 3, frames, height, width).clamp(-1, 1)
    return model, _same_weights(WAN_VAE, WanVAEConfig(), model), video, f"full width, {frames}x{height}x{width}"


def _same_weights(architecture: Architecture, config, model: torch.nn.Module, skip: tuple[str, ...] = ()):
    """Return (graphdef, state) of our module with the weights of PyTorch's."""
    tensors = {key: tensor.numpy() for key, tensor in model.state_dict().items() if key not in skip}
    graphdef, state = nnx.split(architecture.abstract(config))
    targets = flat_state(state)
    shapes = {key: array.shape for key, array in tensors.items()}
    pieces = resolve(architecture.diffusers_rules(config), shapes, targets, name=architecture.label)
    leaves = leaves_from_torch(pieces, targets, lambda key, rows: tensors[key])
    return graphdef, from_flat(state, {path: jnp.asarray(array) for path, array in leaves})


def _seconds(function: Callable[[], np.ndarray]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )


if __name__ == "__main__":
    app.run(main)
