"""Jobs in processes: what breaks one of them is a reason, and stops no other."""

import os
import signal
import subprocess
import sys
import time

import curation_stand_in
import pytest

from avd_jax.curation.runner import run_pool
from avd_jax.curation.worker import Worker, WorkerDied

ANALYSE = "curation_stand_in:analyse"


def run(folder, workers=2, seconds=30.0, memory_gib=4.0):
    jobs = [(path.stem, [str(path), {}]) for path in sorted(folder.glob("*.mp4"))]
    outcomes = run_pool(ANALYSE, jobs, workers=workers, seconds=seconds, memory_gib=memory_gib)
    return {name: (result, wrong) for name, result, wrong in outcomes}


def test_a_job_that_breaks_its_process_gets_a_reason_and_the_others_their_results(tmp_path):
    good = curation_stand_in.found(curation_stand_in.clip())
    names = dict.fromkeys("abcd", good) | {"broken": "crash", "bug": "raise", "large": "memory"}
    outcomes = run(curation_stand_in.write(tmp_path, **names), memory_gib=2.0)
    assert {name: outcomes[name] for name in "abcd"} == dict.fromkeys("abcd", (good, None))
    assert outcomes["broken"] == (None, "crashed its process (signal 11)")
    assert outcomes["bug"] == (None, "stopped with KeyError: 'codec'")
    assert outcomes["large"] == (None, "needs more than 2 GiB of memory")
    assert curation_stand_in.calls(tmp_path)["broken"] == 2  # it may have been another that killed it


def test_a_job_that_takes_too_long_is_ended(tmp_path):
    curation_stand_in.write(tmp_path, slow="hang", good=curation_stand_in.found())
    outcomes = run(tmp_path, seconds=0.7)
    assert outcomes["slow"] == (None, "took longer than 0.7 s")
    assert outcomes["good"][0] is not None


def test_a_caller_that_stops_ends_the_processes(tmp_path):
    curation_stand_in.write(tmp_path, a=curation_stand_in.found(), b="hang", c="hang")
    begun = time.monotonic()
    outcomes = run_pool(
        ANALYSE, [(n, [str(tmp_path / f"{n}.mp4"), {}]) for n in "abc"], workers=2, **curation_stand_in.FAST
    )
    assert next(outcomes)[0] == "a"
    outcomes.close()
    assert time.monotonic() - begun < 100  # they would take 600


def test_a_process_leaves_with_its_parent(tmp_path):
    curation_stand_in.write(tmp_path, a="hang")
    code = (
        "import sys, threading, time; from avd_jax.curation.worker import Worker\n"
        f"worker = Worker({ANALYSE!r}, seconds=60, memory_gib=4)\n"
        f"threading.Thread(target=worker.call, args=({str(tmp_path / 'a.mp4')!r}, {{}}), daemon=True).start()\n"
        "while worker._process is None: time.sleep(0.01)\n"
        "print(worker._process.pid, flush=True); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        pid = int(parent.stdout.readline())
        while not curation_stand_in.calls(tmp_path):
            time.sleep(0.02)
        parent.send_signal(signal.SIGKILL)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{pid}/stat") as stat:  # it has ended, and nobody has asked how
            if stat.read().rpartition(")")[2].split()[0] == "Z":
                return
        time.sleep(0.05)
    pytest.fail("the process is still there")


def test_a_worker_starts_again_after_it_has_died(tmp_path):
    curation_stand_in.write(tmp_path, a="crash", b=curation_stand_in.found())
    worker = Worker(ANALYSE, **curation_stand_in.FAST)
    with pytest.raises(WorkerDied):
        worker.call(str(tmp_path / "a.mp4"), {})
    assert worker.call(str(tmp_path / "b.mp4"), {}) == curation_stand_in.found()
    worker.close()
