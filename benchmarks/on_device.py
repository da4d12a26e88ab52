"""Seconds and memory of a run's programs on the devices at hand, beside what the compiler says of their memory.

    python benchmarks/on_device.py --config configs/wan13b.py --config.batch_size=1
    python benchmarks/on_device.py --config configs/wan13b.py --config.batch_size=1 --programs forward,vae_decode

Arguments are random numbers of the right shapes, so neither weights nor data are needed. Each program runs in a process
of its own, as a run compiles it: once to warm up, then `--repeats` times, of which the median is printed; if a random
draw decides how much there is to compute, the mean of the medians of all that it may be. `measured` is
the most that JAX's allocator gave away, less what the program does not read of its arguments; `compiled` is what the
compiler says. `scripts/aot_compile.py` says nearly the same without the devices. The peak is of the devices' matrix
units in bfloat16. docs/figures.md has the figures of one GPU.
"""

import functools
import json
import math
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags

from avd_jax import command_line, methods
from avd_jax.capacity.budget import GIB, part_of
from avd_jax.capacity.devices import peak_flops
from avd_jax.capacity.program import Program, expected_flops
from avd_jax.fields import flags_parser
from avd_jax.training.assembly import Assembly

CONFIG = config_flags.DEFINE_config_file("config", None, "config file; set a field with --config.FIELD=VALUE")
PROGRAMS = flags.DEFINE_list("programs", [], "some of the run's programs, or 'forward'; by default all of the run")
REPEATS = flags.DEFINE_integer("repeats", 3, "timed runs of each program", lower_bound=1)
FRAMES = flags.DEFINE_integer("frames", 81, "of a video, if config.data.latents is empty")
HEIGHT = flags.DEFINE_integer("height", 480, "likewise, in pixels")
WIDTH = flags.DEFINE_integer("width", 832, "likewise, in pixels")
JSON = command_line.path_flag("json", None, "write the rows to this file too")
HEAD = (
    "| program | seconds | of the peak | GiB, measured | GiB, compiled | compiled in s |",
    "| --- | --- | --- | --- | --- | --- |",
)


def main() -> int:
    """Measure each program and print the table."""
    # JAX takes three quarters of a GPU unless it is told otherwise; read when a process starts to use it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    config = CONFIG.value
    methods.get(config.get("method", "")).validate_values(config)
    video = {"frames": FRAMES.value, "height": HEIGHT.value, "width": WIDTH.value}
    rows, failed = [], 0
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        names, devices = pool.submit(names_and_devices, config, video).result()
    print(devices, *HEAD, sep="\n", flush=True)
    for name in PROGRAMS.value or names:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                row = pool.submit(measure, config, video, name, REPEATS.value).result()
            except Exception as error:
                failed += 1
                print(f"{name}: {' '.join(str(error).split())[:300] or type(error).__name__}", file=sys.stderr)
                continue
        rows.append(row)
        print(as_line(row), flush=True)
        if JSON.value:
            Path(JSON.value).write_text(json.dumps({"devices": devices, "rows": rows}, indent=1) + "\n")
    return int(failed > 0)


def names_and_devices(config, video: dict) -> tuple[list[str], str]:
    """Return the run's programs, and what it runs on."""
    devices = jax.devices()
    about = f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}"
    return assembly_of(config, video).run_programs(), about


def assembly_of(config, video: dict) -> Assembly:
    """Return the run put together for the devices that are here."""
    return Assembly(methods.get(config.method).build(config, video=video))


def measure(config, video: dict, name: str, repeats: int) -> dict:
    """Return a program's row."""
    assembly = assembly_of(config, video)
    program = assembly.program(name)
    begin = time.monotonic()
    traced = program.function.trace(*program.args)
    compiled = traced.lower().compile()
    compile_seconds = time.monotonic() - begin
    memory = compiled.memory_analysis()
    on_device = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    on_device += memory.output_size_in_bytes - memory.alias_size_in_bytes
    args, seconds = random_arguments(program), {}
    for drawn, key in keys_of(assembly, name).items() or {"": None}.items():
        seconds[drawn] = []
        for _ in range(1 + repeats):
            if key is not None:
                args = *args[:-1], key
            begin = time.monotonic()
            result = jax.block_until_ready(compiled(*args))
            seconds[drawn].append(time.monotonic() - begin)
            if name.endswith("_step"):  # the old state is gone, the new one takes its place
                args = result[0], *args[1:]
            del result
    peak = peak_flops(jax.devices()[0].device_kind)
    spent = statistics.mean(statistics.median(each[1:]) for each in seconds.values())
    stats = jax.local_devices()[0].memory_stats() or {}
    unread = part_of("arguments", program.args).device_gib - memory.argument_size_in_bytes / GIB
    work = expected_flops(program, traced=traced) / assembly.mesh.size
    return {
        "program": name,
        "seconds": spent,
        "all_seconds": seconds,
        "flops_a_device": work,
        "of_peak": work / spent / peak if peak else None,
        "measured_gib": stats["peak_bytes_in_use"] / GIB - unread if "peak_bytes_in_use" in stats else None,
        "compiled_gib": on_device / GIB,
        "compile_seconds": compile_seconds,
    }


def keys_of(assembly: Assembly, name: str) -> dict[str, jax.Array]:
    """Return a key for each of the equally likely values of what an update draws, by these values."""
    (update,) = [call.update for call in assembly.calls if call.update.program == name] or [None]
    draws = [draw for draw in update.draws if draw.outcomes] if update else []
    keys: dict[str, jax.Array] = {}
    for number in range(100 * len(draws)):
        key = jax.random.key(number)
        drawn = ", ".join(f"{draw.name} {int(draw.function(key, {}))}" for draw in draws)
        keys.setdefault(drawn, key)
    return dict(sorted(keys.items()))


def random_arguments(program: Program) -> tuple:
    """Return arrays for a program: numbers of the size of Wan's weights; optimisers' moments and counts are 0."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(program.args)

    def make(number: int, path, leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            key = jax.random.key(number)
            return jax.device_put(jax.random.split(key, leaf.shape) if leaf.shape else key, leaf.sharding)
        if "optimizer" in jax.tree_util.keystr(path) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        return maker(leaf.shape, leaf.dtype, leaf.sharding)(np.uint32(number))

    return jax.tree_util.tree_unflatten(tree, [make(i, path, leaf) for i, (path, leaf) in enumerate(leaves)])


@functools.cache
def maker(shape: tuple[int, ...], dtype, sharding):
    """Return a compiled function from a number to scattered values of deviation 0.02; random numbers compile slowly."""

    def make(number):
        bits = jax.lax.iota(jnp.uint32, math.prod(shape)) * np.uint32(2654435761) + number * np.uint32(40503)
        bits = (bits ^ (bits >> 15)) * np.uint32(2246822519)
        uniform = (bits ^ (bits >> 13)).astype(jnp.float32) / 2.0**31 - 1
        return (0.02 * 3**0.5 * uniform).reshape(shape).astype(dtype)

    return jax.jit(make, out_shardings=sharding)


def as_line(row: dict) -> str:
    """Return a row of the table."""
    share = "" if row["of_peak"] is None else f"{row['of_peak']:.0%}"
    measured = "" if row["measured_gib"] is None else f"{row['measured_gib']:.1f}"
    return (
        f"| {row['program']} | {row['seconds']:.2f} | {share} | {measured} | {row['compiled_gib']:.1f} "
        f"| {row['compile_seconds']:.0f} |"
    )


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.run(main, parse_flags=flags_parser(methods.fields_of_file))
