"""Memory of the VAE's programs at Wan's sizes by the TPU compiler, beside what their tiles were chosen by.

    python benchmarks/vae_memory.py                # 480x832 and 720x1280, both directions: minutes each
    python benchmarks/vae_memory.py --sizes 1080x1920 --directions decode --memory_gib 12

Needs `pip install "jax[tpu]"`, and neither a TPU nor weights.
"""

import time

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx
from jax.sharding import Mesh

from avd_jax.data.encoding import decoder_program, decoding_dtype, decoding_on, encoder_program
from avd_jax.models import wan_vae
from avd_jax.models.vae_tiles import GIB, MEMORY_GIB, Pass
from avd_jax.models.wan_vae import WanVAE, WanVAEConfig
from avd_jax.parallel.mesh import replicated
from avd_jax.parallel.topology import tpu_devices

TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "whose first device is compiled for")
FRAMES = flags.DEFINE_integer("frames", 81, "of the clip")
SIZES = flags.DEFINE_list("sizes", ["480x832", "720x1280"], "height x width in pixels")
DIRECTIONS = flags.DEFINE_list("directions", ["encode", "decode"], "some of encode and decode")
MEMORY = flags.DEFINE_float("memory_gib", MEMORY_GIB, "what is granted")

chosen = []


class Watched(Pass):
    """A pass that notes its tiles, how many pixels are made for one of the picture, and the bytes expected."""

    def tiles_within(self, memory_gib: float, held: int):
        """See `Pass`."""
        tiles = super().tiles_within(memory_gib, held)
        height, width = self._sides(tiles)
        made = height.tiles * height.extent * width.tiles * width.extent / height.size / width.size
        chosen.append((tiles, made, (self.needed(tiles) + held) / GIB))
        return tiles


def main(argv) -> None:
    """Compile and print a row for each program."""
    del argv
    device = tpu_devices(TOPOLOGY.value)[0]
    wan_vae.Pass = Watched
    print("| program | tiles | pixels made | expected GiB | arguments | temporaries | results | GiB | compiled in s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for direction in DIRECTIONS.value:
        for size in SIZES.value:
            height, width = map(int, size.split("x"))
            row(direction, height, width, device)


def network(device, *, decode: bool) -> WanVAE:
    """Return the VAE as it runs on a device."""
    vae = WanVAE(WanVAEConfig(), nnx.Rngs(0))
    return decoding_on(vae, device) if decode else vae


def row(direction: str, height: int, width: int, device) -> None:
    """Compile one program."""
    decode, frames = direction == "decode", FRAMES.value
    graphdef, state = nnx.split(nnx.eval_shape(lambda: network(device, decode=decode)))
    shape = (1, (frames - 1) // 4 + 1, height // 8, width // 8, 16) if decode else (1, frames, height, width, 3)
    args = state, jax.ShapeDtypeStruct(shape, jnp.float32)
    one = replicated(Mesh([device], ("one",)))
    args = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), args)
    program = decoder_program if decode else encoder_program
    start = time.monotonic()
    traced = program(graphdef, platform=device.platform, memory_gib=MEMORY.value).trace(*args)
    memory = traced.lower(lowering_platforms=(device.platform,)).compile().memory_analysis()
    seconds = time.monotonic() - start
    parts = [memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.output_size_in_bytes]
    total = sum(parts) + memory.generated_code_size_in_bytes
    (rows, columns), made, expected = chosen[-1]
    figures = [f"{size / GIB:.2f}" for size in (*parts, total)]
    name = f"{direction} {frames}x{height}x{width}, {decoding_dtype(device.platform).name if decode else 'float32'}"
    print(
        f"| {name} | {rows} x {columns} | {made:.2f} | {expected:.2f} | {' | '.join(figures)} | {seconds:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    app.run(main)
