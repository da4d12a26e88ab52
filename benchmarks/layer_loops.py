"""The layer loops of the transformer on one TPU that is not there: the compiler's cycles, forward and backward.

    python benchmarks/layer_loops.py                                  # 1.3B, 32,760 tokens, one device of a v5e
    python benchmarks/layer_loops.py --topology v5p:2x2x1 --dump_hlo hlo
    python benchmarks/layer_loops.py --seq 4                              # its 4 devices share the tokens
    python benchmarks/layer_loops.py --fsdp 4                             # an example each, and share the parameters
    python benchmarks/layer_loops.py --model 14B --topology v5e:8x8 --fsdp 8 --seq 8

Two layers of the full width, with the settings of configs/wan13b.py: what a training step's loops are, in a fraction of
the time that the whole step takes to compile; on one device nothing is exchanged. Attention kernels are not contained.
Prints milliseconds a layer at 1.75 GHz, the largest loop first: the backward pass, remat included, then the forward
pass; then MiB a device and layer in collectives, and GiB of temporaries.
"""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

from avd_jax.capacity.hlo import profile
from avd_jax.models import wan_dit
from avd_jax.models.functional import make_denoiser
from avd_jax.models.placement import AttentionBlocks, Placement
from avd_jax.parallel.compiler import compiler_options
from avd_jax.parallel.mesh import BATCH_AXES, batch_sharding, make_mesh, placed, replicated
from avd_jax.parallel.rules import tree_shardings
from avd_jax.parallel.topology import tpu_devices

TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "whose first devices count")
MODEL = flags.DEFINE_enum("model", "1.3B", list(wan_dit.WAN_MODELS), "whose width")
TOKENS = flags.DEFINE_integer("tokens", 32_760, "of one example")
FSDP = flags.DEFINE_integer("fsdp", 1, "devices with an example each; they share the parameters")
SEQ = flags.DEFINE_integer("seq", 1, "devices that share the tokens of an example, and the parameters")
DUMP_HLO = flags.DEFINE_string("dump_hlo", "", "folder for the compiled text, layer_loops.hlo")
LAYERS = 2
CYCLES_A_MILLISECOND = 1.75e6  # the clock of a v5p, at which all figures are given


def main(_):
    """Compile the loops and print their cycles."""
    devices = tpu_devices(TOPOLOGY.value)[: FSDP.value * SEQ.value]
    mesh = make_mesh(data=1, fsdp=FSDP.value, seq=SEQ.value, devices=devices)
    batch = mesh.shape["fsdp"]
    blocks = AttentionBlocks(backward=(512, 2048, 512), fused_backward=False)
    placement = Placement("auto", mesh=mesh, batch_axes=BATCH_AXES, sequence_axis="seq", blocks=blocks)
    config = replace(wan_dit.WAN_MODELS[MODEL.value], num_layers=LAYERS)
    network = make_denoiser(config, dtype="bfloat16", param_dtype="float32", remat="block", placement=placement)

    def loss(params, x, modulation, context, rotation):
        dit = network.module(params)
        x, *rotation = dit._pad(x, *rotation)
        y = wan_dit._apply_blocks(
            *nnx.split(dit.blocks),
            x,
            modulation,
            context,
            tuple(rotation),
            dtype=jnp.dtype(jnp.bfloat16),
            remat="block",
            placement=placement,
            valid_tokens=TOKENS.value,
        )
        return jnp.mean(y[:, : TOKENS.value] ** 2)

    angles = jax.ShapeDtypeStruct((TOKENS.value, config.head_dim // 2), jnp.float32)
    shapes = (batch, TOKENS.value, config.dim), (batch, 6, config.dim), (batch, config.text_len, config.dim)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    params = network.abstract_params()
    shardings = tree_shardings(params, mesh)
    params = jax.tree.map(placed, params, shardings)
    args = params, *placed(arrays, batch_sharding(mesh)), placed((angles, angles), replicated(mesh))
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)), out_shardings=(shardings, *[batch_sharding(mesh)] * 3))
    lowered = gradient.trace(*args).lower(lowering_platforms=("tpu",))
    compiled = lowered.compile(compiler_options=compiler_options(mesh))
    text = compiled.as_text()
    if DUMP_HLO.value:
        Path(DUMP_HLO.value).mkdir(parents=True, exist_ok=True)
        (Path(DUMP_HLO.value) / "layer_loops.hlo").write_text(text)
    found = profile(text)
    for loop in found.loops[:2]:
        own, inside = loop.cycles / CYCLES_A_MILLISECOND, loop.cycles_inside / CYCLES_A_MILLISECOND
        print(f"{own:.2f} ms a layer, and {inside:.2f} in loops inside")
    print(", ".join(f"{kind} {moved / LAYERS / 2**20:.1f}" for kind, moved in found.collective_bytes.items()), "MiB")
    print(f"{compiled.memory_analysis().temp_size_in_bytes / 2**30:.2f} GiB of temporaries")


if __name__ == "__main__":
    app.run(main)
