"""Cycles of the VAE's programs on one TPU that is not there, Wan's sizes, a group of 4 frames.

    python benchmarks/vae_cycles.py                              # decoding 81x480x832 on one device of a v5e
    python benchmarks/vae_cycles.py --direction encode --topology v6e:2x2

XLA's operations count as the compiler estimates them, and the kernels of `avd_jax/models/vae_kernels.py`, which carry
no estimate, by the bundles of their schedule, waiting included (not waiting for memory). Prints millions of cycles of
each kernel, with the share of the matrix units' peak that it reaches, and by kind, the groups' mean.
"""

import os
import re
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx
from jax.sharding import Mesh

from avd_jax.capacity.devices import find_kind
from avd_jax.capacity.hlo import profile
from avd_jax.capacity.hlo_text import INSTRUCTION, called_by, parse
from avd_jax.data.encoding import decoder_program, decoding_on, encoder_program
from avd_jax.models import vae_kernels
from avd_jax.models.wan_vae import WanVAE, WanVAEConfig
from avd_jax.parallel.mesh import placed, replicated
from avd_jax.parallel.topology import tpu_devices

TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "of which one device counts")
DIRECTION = flags.DEFINE_enum("direction", "decode", ["encode", "decode"], "which program")
SIZE = flags.DEFINE_string("size", "480x832", "height x width in pixels")
FRAMES = flags.DEFINE_integer("frames", 81, "of the clip")
_KERNEL = re.compile(r"(vae_(?:convolve|upsample))_(\d+)x(\d+)x(\d+)_(\d+)_(\d+)_(\d+)(_add)?")
_MOVES = ("copy", "broadcast", "pad", "slice", "concatenate", "dynamic-slice", "reshape", "transpose")
_ROW = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(?:LB|LH|LE|PB|PF|CT)?\s*:[ >]*\{")
_BRANCH = re.compile(r"sbr\.rel.*?bundleno = (\d+)")
_DELAY_SLOTS = 5  # bundles that run whether a branch is taken or not


def main(argv) -> None:
    """Compile, count and print."""
    del argv
    device = tpu_devices(TOPOLOGY.value)[0]
    text, groups = compiled(device), (FRAMES.value - 1) // 4 + 1
    calls = [line for line in text.splitlines() if "tpu_custom_call" in line and _KERNEL.search(line)]
    names = Counter(_KERNEL.search(line)[0] for line in calls)
    kinds, counted = kinds_of(text), {}
    for kind in ("products", "moves", "elementwise"):
        lines = [line if kinds.get(name_of(line)) == kind else without_estimate(line) for line in text.splitlines()]
        counted[kind] = profile("\n".join(lines)).cycles / groups / 1e6
    counted["kernels"] = 0.0
    a_cycle = find_kind(device.device_kind).peak_flops / find_kind(device.device_kind).gigahertz / 1e9
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for name, cycles in zip(names, pool.map(cycles_of, [TOPOLOGY.value] * len(names), names), strict=True):
            counted["kernels"] += names[name] * cycles / 1e6
            share = products_of(name) / a_cycle / cycles
            print(f"{names[name]} x {name}: {cycles / 1e6:.2f}, {share:.0%} of the peak", flush=True)
    print(f"{sum(counted.values()):.1f}: " + ", ".join(f"{kind} {value:.1f}" for kind, value in counted.items()))


def network(device, *, decode: bool) -> WanVAE:
    """Return the VAE as it runs on a device."""
    vae = WanVAE(WanVAEConfig(), nnx.Rngs(0))
    return decoding_on(vae, device) if decode else vae


def compiled(device) -> str:
    """Return the optimised HLO of the program."""
    decode, (height, width) = DIRECTION.value == "decode", map(int, SIZE.value.split("x"))
    graphdef, state = nnx.split(nnx.eval_shape(lambda: network(device, decode=decode)))
    latents = 1, (FRAMES.value - 1) // 4 + 1, height // 8, width // 8, 16
    clip = jax.ShapeDtypeStruct(latents if decode else (1, FRAMES.value, height, width, 3), jnp.float32)
    program = (decoder_program if decode else encoder_program)(graphdef, platform=device.platform)
    args = placed((state, clip), replicated(Mesh([device], ("one",))))
    return program.trace(*args).lower(lowering_platforms=(device.platform,)).compile().as_text()


def kinds_of(text: str) -> dict[str, str]:
    """Return instruction -> 'products', 'moves' or 'elementwise', to which reductions belong."""
    computations, _ = parse(text)

    def multiplies(instruction) -> bool:
        inner = (one for called in called_by(instruction) for one in computations.get(called, {}).values())
        return instruction.operation in ("convolution", "dot") or any(map(multiplies, inner))

    def kind(instruction) -> str:
        if instruction.operation == "while":
            return ""
        return "products" if multiplies(instruction) else "moves" if instruction.operation in _MOVES else "elementwise"

    return {name: kind(one) for computation in computations.values() for name, one in computation.items()}


def name_of(line: str) -> str:
    """Return the name of the instruction on a line of HLO."""
    found = INSTRUCTION.match(line)
    return found["name"] if found else ""


def without_estimate(line: str) -> str:
    """Return a line of HLO that has no cycles."""
    return line.replace("estimated_cycles", "of_another_kind")


def cycles_of(topology: str, name: str) -> int:
    """Return the bundles of a kernel, in a process of its own: the dumps are switched on when libtpu is loaded."""
    _, frames, height, width, channels, out_channels, rows, add = parts_of(name)
    bfloat16 = jnp.bfloat16
    picture = 1, frames, height, width
    if name.startswith(vae_kernels.UPSAMPLE):
        shapes = (*picture, channels), (3, 3, channels, out_channels), (out_channels,)
        loops, cells = [rows, 2 * rows], frames * height // rows

        def call(x, kernel, bias):
            return vae_kernels.upsample(x, kernel=kernel, bias=bias)
    else:
        past = 1, 2, height, width, channels
        shapes = (*picture, channels), past, (3, 3, 3, channels, out_channels), (out_channels,), (channels,)
        shapes += ((*picture, out_channels),) if add else ()
        loops, cells = [frames, 2 * rows, frames * rows, 2 * rows, frames * rows], height // rows

        def call(x, past, kernel, bias, scale, skip=None):
            return vae_kernels.convolve_activated(x, past, False, scale=scale, kernel=kernel, bias=bias, skip=skip)

    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}"
        args = tuple(jax.ShapeDtypeStruct(shape, bfloat16) for shape in shapes)
        jax.jit(call).lower(*placed(args, replicated(Mesh(tpu_devices(topology)[:1], ("one",))))).compile()
        (schedule,) = Path(folder).glob(f"*-{name}*-packed-bundles-post-ra.txt")
        return bundles(schedule.read_text(), cells, [trips for trips in loops if trips > 1])


def bundles(schedule: str, cells: int, loops: list[int]) -> int:
    """Return how many bundles a kernel runs whose cells have loops of so many trips, one after another."""
    texts = []
    for line in schedule.splitlines():
        if _ROW.match(line):
            texts.append(line)
        elif texts:
            texts[-1] += line
    jumps = [(i, int(found[1])) for i, text in enumerate(texts) if (found := _BRANCH.search(text))]
    back = sorted((target, source + _DELAY_SLOTS) for source, target in jumps if target <= source)
    (start, end), *inner = back  # around all is the loop over the grid
    if len(inner) != len(loops):
        raise ValueError(f"{len(inner)} loops in the schedule, and {len(loops)} in the kernel")
    once = end - start - sum(last - begin for begin, last in inner)
    return cells * (once + sum((last - begin) * trips for (begin, last), trips in zip(inner, loops, strict=True)))


def products_of(name: str) -> int:
    """Return the floating-point operations that the layer needs; upsampling needs 16 taps of each pixel."""
    kind, frames, height, width, channels, out_channels, _, _ = parts_of(name)
    taps = 27 if kind == vae_kernels.CONVOLVE else 16
    return 2 * taps * frames * height * width * channels * out_channels


def parts_of(name: str) -> list:
    """Return what a kernel's name tells: kind, frames, height, width, channels in and out, rows, whether it adds."""
    kind, *numbers, add = _KERNEL.fullmatch(name).groups()
    return [kind, *map(int, numbers), bool(add)]


if __name__ == "__main__":
    app.run(main)
