"""Kills and bad spells of a run whose workdir is in a bucket; each must end as the run that nothing disturbed.

    python benchmarks/bucket_drills.py                # all; or some: kill clock slow silent busy token rights
    FAKETIME_LIB=/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1 python benchmarks/bucket_drills.py clock

Every run is `scripts/train.py` on the world of shapes, weights and sets in the bucket, which is the tests' emulator on
this machine; it needs the extra `dev`. `clock` needs Debian's faketime. A drill prints what it did and what it found.
"""

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
STEPS, EVERY = 12, 4
SERVED: list = []


def script(name: str, *arguments: str, **environment: str) -> subprocess.Popen:
    """Start one of our scripts against the emulator."""
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments]
    programs = {"JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "bucket_drills")}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **programs, **environment}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **streams)


def run(workdir: str, **environment: str) -> subprocess.Popen:
    """Start a training run."""
    places = {"init_from": "gs://bucket/wan", "data.latents": "gs://bucket/data/latents"}
    places["data.prompts"] = "gs://bucket/data/prompts"
    sizes = {"num_steps": STEPS, "checkpoint_every": EVERY, "sample_every": 0, "log_every": 1}
    settings = [f"--config.{name}={value}" for name, value in (places | sizes).items()]
    return script("train", "--config=configs/tiny.py", *settings, f"--workdir=gs://bucket/{workdir}", **environment)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Return its status, and the last line that it said."""
    said = process.communicate()[0].strip().splitlines()
    if process.returncode not in (0, -signal.SIGKILL):
        told = next((line for line in said if "Traceback" in line), None)
        said = [*said, *([f"({told})"] if told else [])]
    return process.returncode, said[-1] if said else ""


def parameters(workdir: str) -> str:
    """Return a sum of all arrays of the last checkpoint."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    from etils import epath

    folder, total = epath.Path(f"gs://bucket/{workdir}/checkpoints/{STEPS}"), hashlib.sha256()
    for item in sorted(folder.iterdir()):
        if (item / "_METADATA").exists():
            for _, leaf in jax.tree_util.tree_leaves_with_path(ocp.StandardCheckpointer().restore(item)):
                total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()[:12]


def compared(workdir: str) -> str:
    """Say whether a run ended as the one that nothing disturbed."""
    return "the same parameters" if parameters(workdir) == parameters("straight") else "OTHER PARAMETERS"


def kill() -> None:
    """SIGKILL after so many requests that write to the second checkpoint; then the same command again."""
    for after in (1, 12, 24, 36):
        workdir, seen = f"kill{after}", 0
        process = run(workdir)
        SERVED[0].requests()
        while seen < after and process.poll() is None:
            asked = [path for path, *_ in SERVED[0].requests()]
            seen += sum(not path.startswith("GET") and f"checkpoints/{2 * EVERY}" in path for path in asked)
            time.sleep(0.002)
        process.kill()
        status, _ = ended(process)
        from avd_jax.paths import any_path

        left = sorted(path.name for path in any_path(f"gs://bucket/{workdir}/checkpoints").iterdir())
        whole = [
            name for name in left if any_path(f"gs://bucket/{workdir}/checkpoints/{name}/commit_success.txt").exists()
        ]
        resumed = run(workdir)
        said = resumed.communicate()[0]
        begins = next((line for line in said.splitlines() if line.startswith("going on from")), "from the start")
        print(
            f"killed ({status}) after {seen} writes of step {2 * EVERY}: there were {left}, whole {whole}; {begins}, "
            f"status {resumed.returncode}, {compared(workdir)}",
            flush=True,
        )


def clock() -> None:
    """Killed on a host whose clock is two hours ahead, gone on with on one that is two hours behind."""
    library = os.environ.get("FAKETIME_LIB", "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
    assert Path(library).exists(), f"{library} is not there: apt-get install faketime, or set FAKETIME_LIB"
    for hours in (2, -2):
        workdir = f"clock{hours}"
        other = {"LD_PRELOAD": library, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        process, seen = run(workdir, FAKETIME=f"{hours:+d}h", **other), 0
        SERVED[0].requests()
        while seen < 12 and process.poll() is None:
            asked = [path for path, *_ in SERVED[0].requests()]
            seen += sum(not path.startswith("GET") and f"checkpoints/{2 * EVERY}" in path for path in asked)
            time.sleep(0.002)
        process.kill()
        ended(process)
        status, last = ended(run(workdir, FAKETIME=f"{-hours:+d}h", **other))
        print(f"clock {hours:+d} h, then {-hours:+d} h: status {status}, {compared(workdir)}; {last}", flush=True)


def disturbed(
    name: str, *faults: dict, seconds: float | None = None, after: str = "checkpoints/4", **environment
) -> None:
    """Run with faults that begin with the first checkpoint and end after so many seconds, or stay."""
    process, started = run(name, **environment), time.monotonic()
    SERVED[0].requests()
    while process.poll() is None and not any(after in path for path, *_ in SERVED[0].requests()):
        time.sleep(0.01)
    SERVED[0].faults(*faults)
    began = time.monotonic()
    if seconds is not None:
        while process.poll() is None and time.monotonic() < began + seconds:
            time.sleep(0.1)
        SERVED[0].faults()
    status, last = ended(process)
    took = time.monotonic() - began
    SERVED[0].faults()
    print(f"{name}: status {status} after {took:.0f} s ({began - started:.0f} s before): {last[:400]}", flush=True)
    if status:
        status, last = ended(run(name))
        print(f"  the same command again: status {status}: {last}", flush=True)
    print(f"  {compared(name)}", flush=True)


DRILLS = {
    "kill": kill,
    "clock": clock,
    "slow": lambda: disturbed("slow", {"match": "/b/", "delay": 0.3}, seconds=60),
    "silent": lambda: disturbed("silent", {"match": "checkpoints", "delay": 100, "times": 3}),
    "busy": lambda: disturbed("busy", {"match": "/b/", "status": 503, "message": "busy"}, seconds=40),
    "away": lambda: disturbed("away", {"match": "/b/", "status": 503, "message": "busy"}),
    "token": lambda: disturbed("token", {"match": "/b/", "status": 401, "message": "Invalid Credentials"}),
    "token in Orbax": lambda: disturbed(
        "orbax", {"match": r"checkpoints.*(/d/|manifest)", "status": 401, "message": "Invalid Credentials"}
    ),
    "token in ArrayRecord": lambda: disturbed(
        "record", {"match": "array_record", "status": 401, "message": "Invalid Credentials"}, after="array_record"
    ),
    "rights": lambda: disturbed("rights", {"match": "POST.*checkpoints", "status": 403, "message": "me@x may not"}),
}


def main() -> None:
    """Prepare weights and sets in the bucket and a run that nothing disturbs, then run the drills."""
    from bucket_cases import started

    SERVED.append(started())
    assert ended(script("convert", "--src=weights/tiny", "--dst=gs://bucket/wan"))[0] == 0
    encode = [
        "--shapes_world",
        "--weights=gs://bucket/wan",
        "--clips=32",
        "--prompt_count=32",
        "--out=gs://bucket/data",
    ]
    assert ended(script("encode", *encode))[0] == 0
    began = time.monotonic()
    print(f"straight: {ended(run('straight'))}, {time.monotonic() - began:.0f} s", flush=True)
    for name in sys.argv[1:] or DRILLS:
        DRILLS[name]()
    SERVED[0].close()


if __name__ == "__main__":
    main()
