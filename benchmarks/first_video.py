"""When the phases of scripts/generate.py begin and end, from the start of the process to the first video.

    python benchmarks/first_video.py --weights weights/tiny --solver unipc --steps 4 --prompt "a disc" --out out
    python benchmarks/first_video.py --apart --weights ...       # loading and compiling one after the other

All flags but --apart are those of scripts/generate.py. Embeddings of prompts are not read from the user's cache unless
--prompt_cache says so, nor are compiled programs unless JAX_COMPILATION_CACHE_DIR is set.
"""

import os
import runpy
import sys
import tempfile
import threading
import time
from pathlib import Path

STARTED = (
    time.time()
    - time.clock_gettime(time.CLOCK_BOOTTIME)
    + float(Path("/proc/self/stat").read_text().rsplit(")")[-1].split()[19]) / os.sysconf("SC_CLK_TCK")
)
PHASES: list[tuple[str, float, float]] = []
LOCK = threading.RLock()  # loading a transformer loads a module


def timed(module, name: str, phase: str, *, apart: bool = False) -> None:
    """Note when calls of a function begin and end; with `apart` only one such call runs at a time."""
    original = getattr(module, name)

    def call(*args, **options):
        if apart:
            LOCK.acquire()
        begin = time.time()
        try:
            return original(*args, **options)
        finally:
            PHASES.append((phase, begin - STARTED, time.time() - STARTED))
            if apart:
                LOCK.release()

    setattr(module, name, call)


def main() -> None:
    """Run the script with its functions timed, then print them."""
    apart = "--apart" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--apart"]
    root = Path(__file__).parents[1]
    sys.path.insert(0, str(root))
    import jax

    from avd_jax.generation import pipeline, run, sampling

    PHASES.append(("start and imports", 0.0, time.time() - STARTED))
    timed(run, "open_parts", "weights opened")
    timed(sampling, "embeddings_of", "texts encoded, their encoder loaded")
    timed(sampling, "load_module", "a network loaded", apart=apart)
    timed(sampling, "load_transformer", "transformer loaded", apart=apart)
    timed(pipeline.Steps, "compiled", "steps compiled", apart=apart)
    timed(sampling, "_compiled_decoder", "decoder compiled", apart=apart)
    timed(pipeline.Steps, "__call__", "steps started")
    timed(sampling, "to_host", "steps and decoding run")
    timed(run, "write_video", "written")
    if not any(argument.startswith("--prompt_cache") for argument in arguments):
        arguments.append(f"--prompt_cache={tempfile.mkdtemp()}")
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
    script = root / "scripts" / "generate.py"
    sys.argv = [str(script), *arguments]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        for phase, begin, end in sorted(PHASES, key=lambda row: row[1]):
            print(f"{begin:7.1f} - {end:7.1f} s  {phase}", file=sys.stderr)


if __name__ == "__main__":
    main()
