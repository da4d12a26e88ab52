"""Rank TPU attention kernels and their block sizes by what the compiler schedules; needs no TPU.

    python scripts/tune_attention.py --topology v5e:2x2 --heads 12
    python scripts/tune_attention.py --topology v5p:2x2x1 --heads 5 --forward 1024,1024 --backward 1024,4096,512 --json

Heads are those on one device: the model's 12 or 40 over `config.mesh.seq`. Set the best as `config.attention.*`.
"""

import json

from absl import flags

from avd_jax import command_line
from avd_jax.capacity.kernel_search import estimate
from avd_jax.errors import UserError
from avd_jax.models.placement import AttentionBlocks

FORWARD = ["1024,1024", "1024,512", "1024,2048,512", "1024,2048,1024", "512,2048,512"]
BACKWARD = ["1024,2048,512", "512,2048,512", "1024,4096,512"]

TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "a slice of the TPU in question")
HEADS = flags.DEFINE_integer("heads", 12, "attention heads on one device", lower_bound=1)
TOKENS = flags.DEFINE_integer("tokens", 32_760, "of a whole clip, padding not counted", lower_bound=1)
FORWARD_BLOCKS = flags.DEFINE_multi_string(
    "forward", FORWARD, "pipelined: queries, keys at a time; splash: queries, keys, keys at a time; may be repeated"
)
BACKWARD_BLOCKS = flags.DEFINE_multi_string("backward", BACKWARD, "queries, keys, keys at a time; may be repeated")
SPLIT = flags.DEFINE_bool("split", False, "try the backward pass as two kernels, which need less memory")
JSON = flags.DEFINE_bool("json", False, "print one JSON object a candidate, and nothing else")


def parsed(text: str, *lengths: int) -> tuple[int, ...]:
    """Return the numbers of a flag, as many as one of `lengths`."""
    try:
        numbers = tuple(int(number) for number in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in lengths:
        wanted = {2: "two numbers, such as 1024,1024 (pipelined)", 3: "three, such as 1024,2048,512 (splash)"}
        raise UserError(f"{text!r} are no block sizes; write " + " or ".join(wanted[length] for length in lengths))
    return numbers


def candidate(forward: tuple[int, ...], backward: tuple[int, ...]) -> tuple[str, AttentionBlocks]:
    """Return kernel and blocks; the number of sizes tells the kernel."""
    kernel, name = ("pipelined", "pipelined") if len(forward) == 2 else ("splash", "forward")
    return kernel, AttentionBlocks(**{name: forward}, backward=backward, fused_backward=not SPLIT.value)


def main() -> int:
    """Compile the candidates one by one, and print them ranked."""
    forward = [parsed(text, 2, 3) for text in FORWARD_BLOCKS.value]
    backward = [parsed(text, 3) for text in BACKWARD_BLOCKS.value]
    # Both directions are searched apart: neither depends on the other's blocks.
    candidates = [candidate(blocks, backward[0]) for blocks in forward]
    candidates += [candidate(forward[0], blocks) for blocks in backward[1:]]
    done = []
    for kernel, blocks in candidates:
        result = estimate(TOPOLOGY.value, kernel, blocks, heads=HEADS.value, tokens=TOKENS.value)
        found = result.as_dict()
        if not result.error:
            done.append((result, found))
        if JSON.value:
            print(json.dumps({"topology": TOPOLOGY.value} | found), flush=True)
            continue
        text = result.error or "; ".join(
            f"{name} {found[name]['ms']:.1f} ms ({found[name]['ratio']:.2f} of the limit)"
            for name in ("forward", "backward")
        )
        memory = "" if result.error else f"; {result.memory_gib:.2f} GiB of temporaries"
        sizes = f"{found['forward_blocks']}, backward {found['backward_blocks']}"
        print(f"{kernel} {sizes}: {text}{memory}", flush=True)
    if not done:
        raise UserError("none of these block sizes compiles; try smaller ones")
    if not JSON.value:
        best, found = min(done, key=lambda pair: pair[0].milliseconds["forward"])
        backward = min(done, key=lambda pair: pair[0].milliseconds["backward"])[0].blocks.backward
        field = "pipelined" if best.kernel == "pipelined" else "forward"
        print(
            f"--config.attention.kernel={best.kernel} "
            f'--config.attention.{field}_blocks="{tuple(found["forward_blocks"])}" '
            f'--config.attention.backward_blocks="{backward}"'
        )
    return 0


if __name__ == "__main__":
    command_line.run(main)
