"""Rank block sizes of the TPU attention kernel by what the compiler makes of them; needs no TPU.

    python scripts/tune_attention.py --topology v5e:2x2 --heads 12
    python scripts/tune_attention.py --topology v5p:2x2x1 --heads 5 --forward 1024,2048,512 --backward 1024,4096,512

Heads are those on one device: the model's 12 or 40 over `config.mesh.seq`. Set the best as `config.attention.*`.
"""

from absl import flags

from avd_jax import command_line
from avd_jax.capacity.kernel_search import estimate
from avd_jax.errors import UserError
from avd_jax.models.placement import SplashBlocks

FORWARD = ["512,2048,512", "1024,2048,512", "1024,4096,512", "2048,2048,512"]
BACKWARD = ["512,2048,512", "1024,2048,512", "1024,4096,512"]

TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "a slice of the TPU in question")
HEADS = flags.DEFINE_integer("heads", 12, "attention heads on one device", lower_bound=1)
TOKENS = flags.DEFINE_integer("tokens", 32_760, "of a whole clip, padding not counted", lower_bound=1)
FORWARD_BLOCKS = flags.DEFINE_multi_string("forward", FORWARD, "queries, keys, keys at a time; may be repeated")
BACKWARD_BLOCKS = flags.DEFINE_multi_string("backward", BACKWARD, "likewise; may be repeated")
SPLIT = flags.DEFINE_bool("split", False, "try the backward pass as two kernels, which need less memory")


def parsed(text: str) -> tuple[int, ...]:
    """Return the numbers of a flag."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise UserError(f"{text!r} is no block size; write three numbers, such as 1024,2048,512") from error


def main() -> int:
    """Compile the candidates one by one, and print them ranked."""
    forward, backward = ([parsed(text) for text in given.value] for given in (FORWARD_BLOCKS, BACKWARD_BLOCKS))
    # Both directions are searched apart: neither depends on the other's blocks.
    candidates = [SplashBlocks(blocks, backward[0], not SPLIT.value) for blocks in forward]
    candidates += [SplashBlocks(forward[0], blocks, not SPLIT.value) for blocks in backward[1:]]
    found = []
    for blocks in candidates:
        found.append(estimate(TOPOLOGY.value, blocks, heads=HEADS.value, tokens=TOKENS.value))
        result = found[-1]
        milliseconds = ", ".join(f"{kernel} {value:.1f} ms" for kernel, value in sorted(result.milliseconds.items()))
        text = result.error or f"{milliseconds}; {result.memory_gib:.2f} GiB of temporaries"
        print(f"forward {blocks.forward} backward {blocks.backward}: {text}", flush=True)
    done = [result for result in found if not result.error]
    if not done:
        raise UserError("none of these block sizes compiles; try smaller ones")
    best_forward = min(done, key=lambda result: result.milliseconds["fwd"]).blocks.forward
    best_backward = min(done, key=lambda result: result.total - result.milliseconds["fwd"]).blocks.backward
    print(f'--config.attention.forward_blocks="{best_forward}" --config.attention.backward_blocks="{best_backward}"')
    return 0


if __name__ == "__main__":
    command_line.run(main)
