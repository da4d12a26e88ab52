"""Kills and bad spells of a run whose workdir is in a bucket; each must end as the run that nothing disturbed.

    python benchmarks/bucket_drills.py                # all, or some by name: kill clock slow

Every run is `scripts/train.py` on the tests' tiny transformer, with weights, sets and workdir in a bucket: the tests'
emulator on this machine; it needs the extra `dev`. A drill prints what came of it. `clock` changes Python's clock: with
libfaketime TensorStore hangs, since its waits go past that to the kernel's.
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
SECOND = f"checkpoints/{2 * EVERY}"
BUCKET = "gs://bucket"
SERVER: list = []
OTHER_CLOCK = """
import runpy, sys, time
real, hours = time.time, int(sys.argv[1])
time.time = lambda: real() + 3600 * hours
sys.argv = sys.argv[2:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(workdir: str, hours: int = 0) -> subprocess.Popen:
    """Start a training run against the emulator, on a host whose clock is some hours ahead."""
    fields = {
        **{
            "init_from": f"{BUCKET}/in/dit",
            "data.latents": f"{BUCKET}/in/latents",
            "data.prompts": f"{BUCKET}/in/prompts",
        },
        **{"num_steps": STEPS, "checkpoint_every": EVERY, "log_every": 1, "sample_every": 0, "fake_score_updates": 1},
    }
    settings = [f"--config.{name}={value}" for name, value in fields.items()]
    script = [
        sys.executable,
        "-c",
        OTHER_CLOCK,
        str(hours),
        str(ROOT / "scripts" / "train.py"),
        "--config=configs/tiny.py",
    ]
    environment = {
        **{**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        **{"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
        **{"JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "bucket_drills")},
    }
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*script, *settings, f"--workdir={BUCKET}/{workdir}"], cwd=ROOT, env=environment, **streams)


def ended(process: subprocess.Popen) -> str:
    """Return its status and what it said at its end, or that it was a traceback."""
    said = [line for line in process.communicate()[0].splitlines() if line.strip()]
    trace = " TRACEBACK" if any(line.startswith("Traceback") for line in said) else ""
    begins = next((line for line in said if line.startswith("going on from")), "from the start")
    return f"status {process.returncode}{trace}, {begins}, at its end: {said[-1][:300] if said else ''}"


def wait_for(process: subprocess.Popen, match: str, count: int = 1) -> int:
    """Return once so many requests that write have a path with `match`, or the process has ended."""
    SERVER[0].requests()
    seen = 0
    while seen < count and process.poll() is None:
        seen += sum(not path.startswith("GET") and match in path for path, *_ in SERVER[0].requests())
        time.sleep(0.002)
    return seen


def compared(workdir: str) -> str:
    """Say whether a run ended as the one that nothing disturbed."""
    return "THE SAME PARAMETERS" if parameters(workdir) == parameters("straight") else "OTHER PARAMETERS"


def parameters(workdir: str) -> str:
    """Return a sum of all arrays of the last checkpoint."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    from etils import epath

    folder, total = epath.Path(f"{BUCKET}/{workdir}/checkpoints/{STEPS}"), hashlib.sha256()
    for item in sorted(folder.iterdir()):
        if (item / "_METADATA").exists():
            for _, leaf in jax.tree_util.tree_leaves_with_path(ocp.StandardCheckpointer().restore(item)):
                total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()


def kill() -> None:
    """SIGKILL after so many requests that write the second checkpoint; then the same command again."""
    from avd_jax.paths import any_path

    for after in (1, 8, 16, 24, 32, 40):
        workdir = f"kill{after}"
        process = run(workdir)
        seen = wait_for(process, SECOND, after)
        process.kill()
        process.communicate()
        folder = any_path(f"{BUCKET}/{workdir}/checkpoints")
        whole = {path.name: (path / "commit_success.txt").exists() for path in folder.iterdir()}
        print(f"killed after {seen} writes of step {2 * EVERY}; folders, and whether whole: {whole}", flush=True)
        print(f"  again: {ended(run(workdir))}; {compared(workdir)}", flush=True)


def clock() -> None:
    """Killed on a host whose clock is two hours ahead, resumed on one that is two hours behind; and the reverse."""
    for hours in (2, -2):
        process = run(f"clock{hours}", hours)
        wait_for(process, SECOND, 12)
        process.kill()
        process.communicate()
        resumed = ended(run(f"clock{hours}", -hours))
        print(f"clock {hours:+d} h, killed, then {-hours:+d} h: {resumed}; {compared(f'clock{hours}')}", flush=True)


def disturbed(name: str, fault: dict, *, seconds: float | None = None, after: str = f"checkpoints/{EVERY}") -> None:
    """Run with a fault that begins with the first checkpoint, and ends after so many seconds or stays."""
    process = run(name)
    wait_for(process, after)
    SERVER[0].faults(fault)
    began = time.monotonic()
    if seconds is not None:
        while process.poll() is None and time.monotonic() < began + seconds:
            time.sleep(0.1)
        SERVER[0].faults()
    said = ended(process)
    print(f"{name}: {time.monotonic() - began:.0f} s after it began {said}", flush=True)
    SERVER[0].faults()
    if process.returncode:
        print(f"  again: {ended(run(name))}", flush=True)
    print(f"  {compared(name)}", flush=True)


EXPIRED = {"status": 401, "message": "Invalid Credentials"}
DRILLS = {
    "kill": kill,
    "clock": clock,
    "slow": lambda: disturbed("slow", {"match": "/b/", "delay": 0.5}, seconds=60),
    "silent": lambda: disturbed("silent", {"match": "checkpoints", "delay": 100, "times": 3}),
    "busy": lambda: disturbed("busy", {"match": "/b/", "status": 503, "message": "busy"}, seconds=40),
    "away": lambda: disturbed("away", {"match": "/b/", "status": 503, "message": "busy"}),
    "expired": lambda: disturbed("expired", {"match": "/b/", **EXPIRED}),
    "expired_shortly": lambda: disturbed("expired_shortly", {"match": "/b/.*metrics|lock", **EXPIRED}, seconds=20),
    "expired_in_orbax": lambda: disturbed("expired_in_orbax", {"match": "checkpoints.*/d/", **EXPIRED}),
    "expired_in_array_record": lambda: disturbed("record", {"match": "array_record", **EXPIRED}),
    "rights": lambda: disturbed("rights", {"match": "POST.*checkpoints", "status": 403, "message": "me@x may not"}),
}


def main() -> None:
    """Prepare weights and sets in the bucket and a run that nothing disturbs, then run the drills."""
    from bucket_cases import started
    from training_cases import write_sets, write_weights

    from avd_jax.paths import any_path

    SERVER.append(started())
    assert sys.argv[1:] == [] or set(sys.argv[1:]) <= set(DRILLS), f"drills are {', '.join(DRILLS)}"
    inputs = any_path(f"{BUCKET}/in")
    write_sets(inputs)
    with tempfile.TemporaryDirectory() as folder:
        for file in write_weights(Path(folder) / "dit").iterdir():
            (inputs / "dit" / file.name).upload(file)
    began = time.monotonic()
    straight = run("straight")
    print(f"undisturbed: {ended(straight)}, {time.monotonic() - began:.0f} s", flush=True)
    assert straight.returncode in (0, -signal.SIGKILL)
    for name in sys.argv[1:] or DRILLS:
        DRILLS[name]()
    SERVER[0].close()


if __name__ == "__main__":
    main()
