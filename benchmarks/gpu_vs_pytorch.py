"""One evaluation of the whole 1.3B transformer on a GPU: ours beside diffusers', bfloat16, in alternating pairs.

    python benchmarks/gpu_vs_pytorch.py --config configs/wan13b.py
    python benchmarks/gpu_vs_pytorch.py --config configs/wan13b.py --compiled    # torch.compile on diffusers' side

It needs a GPU, and PyTorch and diffusers beside JAX. Weights and inputs are random numbers of the right shapes; that
both compute the same is what `make parity` shows. The row gives the median seconds of each side and the median of the
ratios, ours over PyTorch's, with their range.
"""

import os
import statistics
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs room beside it

import diffusers
import jax
import torch
from absl import flags
from on_device import CONFIG, FRAMES, HEIGHT, WIDTH, assembly_of, random_arguments

from avd_jax import command_line, methods
from avd_jax.fields import flags_parser

PAIRS = flags.DEFINE_integer("pairs", 7, "timed pairs, after two runs of each side to warm up", lower_bound=1)
COMPILED = flags.DEFINE_bool("compiled", False, "compile diffusers' transformer with torch.compile")


def main() -> None:
    """Measure and print the row."""
    config = CONFIG.value
    config.batch_size = 1
    ours, theirs = jax_forward(config), torch_forward()
    for _ in range(2):
        ours(), theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(PAIRS.value)]
    ratios = [a / b for a, b in pairs]
    print(
        f"{jax.devices()[0].device_kind}; jax {jax.__version__}, torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}{', torch.compile' if COMPILED.value else ''}\n"
        f"{FRAMES.value}x{HEIGHT.value}x{WIDTH.value}: ours {statistics.median(a for a, _ in pairs):.4f} s, "
        f"PyTorch {statistics.median(b for _, b in pairs):.4f} s, "
        f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})",
        flush=True,
    )


def jax_forward(config):
    """Return a function that makes one evaluation and waits for it."""
    video = {"frames": FRAMES.value, "height": HEIGHT.value, "width": WIDTH.value}
    program = assembly_of(config, video).program("forward")
    compiled, arguments = program.function.lower(*program.args).compile(), random_arguments(program)
    return lambda: jax.block_until_ready(compiled(*arguments))


def torch_forward():
    """Return the like of diffusers, whose default sizes are those of the 14B model."""
    model = diffusers.WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30)
    model = model.to("cuda", torch.bfloat16).eval()
    if COMPILED.value:
        model = torch.compile(model)
    shape = 1, 16, (FRAMES.value - 1) // 4 + 1, HEIGHT.value // 8, WIDTH.value // 8
    latents = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    text = torch.randn((1, 512, 4096), device="cuda", dtype=torch.bfloat16)
    timestep = torch.full((1,), 500, device="cuda")

    def run():
        with torch.no_grad():
            model(latents, timestep, text)
        torch.cuda.synchronize()

    return run


def seconds(function) -> float:
    """Return how long a call takes."""
    begin = time.monotonic()
    function()
    return time.monotonic() - begin


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.run(main, parse_flags=flags_parser(methods.fields_of_file))
