"""One writer of a folder in a bucket: who is at work is not disturbed, who was killed is followed."""

import json
import subprocess
import sys
import time

import pytest

from avd_jax.data import bucket_lock
from avd_jax.data.atomic import only_writer
from avd_jax.errors import UserError


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(bucket_lock, "BEAT", 0.05)
    monkeypatch.setattr(bucket_lock, "DEAD", 5.0)


def written(path, **changes):
    """Leave the lock of another process."""
    about = {"writer": "other", **bucket_lock._this_process(), **changes}
    path.write_text(json.dumps(about))


def test_a_folder_has_one_writer_at_a_time(bucket):
    with only_writer(bucket) as check:
        assert (bucket / ".lock").is_file()
        with pytest.raises(UserError, match=f"{bucket}: another process is writing to it"), only_writer(bucket):
            pass
        with only_writer(bucket, "1-of-2"):  # a file of its own
            check()
    assert not bucket.exists()
    with only_writer(bucket):
        pass


def test_a_process_of_this_machine_that_is_gone_is_not_waited_for(bucket, monkeypatch):
    monkeypatch.setattr(bucket_lock, "DEAD", 600.0)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    written(bucket / ".lock", pid=gone.pid)
    with only_writer(bucket):
        pass


@pytest.mark.parametrize("content", [None, "", "damaged"])
def test_one_elsewhere_is_followed_once_it_is_silent(bucket, monkeypatch, content):
    monkeypatch.setattr(bucket_lock, "DEAD", 0.2)
    written(bucket / ".lock", host=["another"])
    if content is not None:
        (bucket / ".lock").write_text(content)
    with only_writer(bucket):
        assert json.loads((bucket / ".lock").read_text())["writer"] != "other"


def test_who_was_taken_for_dead_learns_it(bucket):
    def taken_over():
        with only_writer(bucket) as check:
            written(bucket / ".lock")
            until = time.monotonic() + 60
            while time.monotonic() < until:
                check()
                time.sleep(0.02)

    with pytest.raises(UserError, match="another process has taken it over"):
        taken_over()
    assert json.loads((bucket / ".lock").read_text())["writer"] == "other"


def test_a_bad_spell_of_the_bucket_costs_no_lock(bucket, bucket_server):
    with only_writer(bucket) as check:
        bucket_server.faults({"match": r"/o\?.*name=.*lock", "status": 503, "times": 2})
        before = (bucket / ".lock").stat().generation
        until = time.monotonic() + 60
        while (bucket / ".lock").stat().generation == before and time.monotonic() < until:
            time.sleep(0.05)
        check()
        assert (bucket / ".lock").stat().generation != before
