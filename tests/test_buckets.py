"""Paths in a bucket, beside the same on a disk; and what a bucket that fails makes of them."""

import io
import re
import threading

import fsspec
import numpy as np
import pytest

from avd_jax.errors import UserError
from avd_jax.paths import any_path, bucket_trouble, in_time, on_disk, read_values, state_of


@pytest.fixture(autouse=True)
def soon(request, monkeypatch):
    """What fails is tried again soon."""
    if "bucket_server" in request.fixturenames:
        request.getfixturevalue("bucket_server")
        monkeypatch.setattr("avd_jax.bucket_requests._LONGEST_PAUSE", 0.05)


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    return tmp_path / "x" if request.param == "disk" else request.getfixturevalue("bucket")


def test_the_same_methods(folder):
    assert (folder.exists(), folder.is_dir(), folder.is_file()) == (False,) * 3
    (folder / "deep" / "er").mkdir(parents=True)
    for name in ("a.txt", "b.json", "deep/c.txt", "deep/er/d e#?.txt"):
        (folder / name).write_text(f"ü {name}", encoding="utf-8")
    file = folder / "a.txt"
    assert (folder.exists(), folder.is_dir(), folder.is_file()) == (True, True, False)
    assert (file.exists(), file.is_dir(), file.is_file(), file.is_symlink()) == (True, False, True, False)
    assert not (folder / "a").exists()
    assert not (folder / "dee").is_dir()
    assert (folder / "deep/er/d e#?.txt").read_text(encoding="utf-8") == "ü deep/er/d e#?.txt"
    assert sorted(child.name for child in folder.iterdir()) == ["a.txt", "b.json", "deep"]

    def below(pattern):
        return sorted(str(path.relative_to(folder)) for path in folder.glob(pattern))

    assert below("*.txt") == ["a.txt"]
    assert below("*/*.txt") == ["deep/c.txt"]
    assert below("deep/*") == ["deep/c.txt", "deep/er"]
    assert below("deep/c.txt") == ["deep/c.txt"]
    assert below("none/*") == []
    assert sorted(path.name for path in folder.rglob("*.txt")) == ["a.txt", "c.txt", "d e#?.txt"]
    assert state_of(file)[0] == file.stat().st_size == len("ü a.txt".encode())
    file.unlink()
    file.unlink(missing_ok=True)
    for missing in (file.unlink, file.read_bytes, file.stat, lambda: list(file.iterdir()), lambda: file.open("rb")):
        with pytest.raises(FileNotFoundError):
            missing()


def test_reading_by_parts(folder, monkeypatch):
    data = np.random.default_rng(0).integers(0, 256, 3_000_001, np.uint8).tobytes()
    folder.mkdir()
    path = folder / "data"
    path.write_bytes(data)
    with path.open("rb") as file:
        assert file.read(8) == data[:8]
        assert file.seek(-5, io.SEEK_END) == len(data) - 5
        assert file.read() == data[-5:]
        file.seek(1_000_000)
        assert file.read(1_500_000) == data[1_000_000:2_500_000]
    assert read_values(path, np.dtype("<u2"), 3, offset=4).tobytes() == data[4:10]
    with on_disk(path) as local:
        assert local.read_bytes() == data
    assert local.exists() == (local == path)


def test_large_ones_go_in_several_requests(bucket, bucket_server, tmp_path, monkeypatch):
    monkeypatch.setattr("avd_jax.buckets._RANGE_BYTES", 2**20)
    data = np.random.default_rng(0).integers(0, 256, 9_000_001, np.uint8).tobytes()
    (tmp_path / "there").write_bytes(data)
    (bucket / "x").upload(tmp_path / "there")
    (bucket / "x").download(tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    assert (bucket / "x").read_range(5, 8_000_000) == data[5:8_000_000]
    bucket.rmtree()
    assert not bucket.exists()
    with pytest.raises(io.UnsupportedOperation):
        (bucket / "x").open("a")


def test_a_condition_on_what_is_there(bucket):
    path = bucket / "x"
    first = path.write_bytes(b"1", generation="0")
    assert first == path.stat().generation != ""
    with pytest.raises(FileExistsError):
        path.write_bytes(b"2", generation="0")
    second = path.write_bytes(b"2", generation=first)
    with pytest.raises(FileExistsError):
        path.write_bytes(b"3", generation=first)
    assert (path.read_bytes(), path.stat().generation) == (b"2", second)


@pytest.mark.parametrize("status", [429, 503])
def test_a_bad_spell_passes(bucket, bucket_server, status):
    bucket_server.faults({"match": "/o", "status": status, "times": 2})
    (bucket / "x").write_text("there")
    assert (bucket / "x").read_text() == "there"


def failing(monkeypatch, bucket_server, patience=0.3, **fault):
    monkeypatch.setattr("avd_jax.bucket_requests._PATIENCE", patience)
    monkeypatch.setattr("avd_jax.bucket_requests._PATIENCE_AT_FIRST", patience)
    bucket_server.faults({"match": "/b/", **fault})


def test_one_that_stays_away_is_one_line(bucket, bucket_server, monkeypatch):
    failing(monkeypatch, bucket_server, status=503, message="backend error")
    with pytest.raises(UserError, match=rf"{bucket}/x: the bucket does not answer .*; run the same command again"):
        (bucket / "x").read_text()


def test_after_one_that_stayed_away_the_next_request_is_not_waited_for_as_long(bucket, bucket_server, monkeypatch):
    (bucket / "x").write_text("")
    failing(monkeypatch, bucket_server, status=503, message="backend error")
    monkeypatch.setattr("avd_jax.bucket_requests._PATIENCE_AT_FIRST", 0.0)
    asked = []
    for _ in range(2):
        bucket_server.requests()
        with pytest.raises(UserError, match="the bucket does not answer"):
            (bucket / "x").read_text()
        asked.append(len(bucket_server.requests()))
    assert asked[0] >= 1
    assert asked[1] == 1
    bucket_server.faults()
    (bucket / "x").read_text()
    bucket_server.faults({"match": "/b/", "status": 503, "message": "busy", "times": 1})
    monkeypatch.setattr("avd_jax.bucket_requests._PATIENCE", 60)
    assert (bucket / "x").read_text() == "", "once it answers, it is waited for again"


def test_no_rights(bucket, bucket_server, monkeypatch):
    failing(monkeypatch, bucket_server, status=403, message="me@x does not have storage.objects.get access")
    said = rf"{bucket}/x: the account has no right .*storage.objects.get.* roles/storage.objectUser"
    resumed = f"{bucket_server.url}/upload/storage/v1/b/bucket/o?uploadType=resumable&name={bucket.name}/x&upload_id=y"
    again = fsspec.filesystem("gcs", finalize_on_close=True)
    for call in (
        *((bucket / "x").exists, (bucket / "x").read_bytes, lambda: (bucket / "x").write_text("")),
        lambda: again.call("PUT", resumed, data=b"z"),
    ):
        with pytest.raises(UserError, match=said) as error:
            call()
        assert "\n" not in str(error.value)
        assert "http" not in str(error.value)


def test_no_credentials(bucket, bucket_server, monkeypatch):
    (bucket / "x").write_text("")
    failing(monkeypatch, bucket_server, status=401, message="Anonymous caller", patience=0.5)
    with pytest.raises(UserError, match=rf"{bucket}/x: there are no valid credentials .*gcloud auth"):
        (bucket / "x").read_text()


def test_credentials_that_expire_are_asked_for_again(bucket, bucket_server):
    (bucket / "x").write_text("there")
    bucket_server.faults({"match": "/b/", "status": 401, "message": "Invalid Credentials", "times": 2})
    assert (bucket / "x").read_text() == "there"


def test_no_such_bucket(bucket_server):
    path = any_path("gs://other/x")
    for call in (path.exists, path.read_bytes, lambda: list(path.iterdir()), lambda: path.write_text("x")):
        with pytest.raises(UserError, match="gs://other: there is no such bucket; correct the name, or make it"):
            call()


SAID = {
    "valid credentials .*invalid token.*gcloud auth": (
        "PERMISSION_DENIED: Error reading gs://bucket/w/d/0: invalid token [http_response_code='401'] "
        '[http_response_body=\'{\\"error\\": {\\"code\\": 401, \\"message\\": \\"invalid token\\"}}\']'
    ),
    "valid credentials .*Credentials not found": "NOT_FOUND: Credentials not found in $GOOGLE_APPLICATION_CREDENTIALS",
    "has no right .*me@x.*objectUser": (
        'Permanent error, with a last message of {"error": {"code": 403, "message": "me@x may not"}}; reading '
        "gs://bucket/w/d/0; at byte 0"
    ),
    "does not answer .*run the same command": (
        "ABORTED: Error writing gs://bucket/w/d/0: All 13 retry attempts failed: busy [http_response_code='503']"
    ),
    "does not answer .*silent": "DEADLINE_EXCEEDED: gs://bucket/w/d/0 was silent",
    "does not answer .*exhausted": "Retry policy exhausted, with a last message of gs://bucket/w/d/0",
}


@pytest.mark.parametrize("expected", SAID)
def test_what_other_libraries_say_of_a_bucket_is_one_line(expected, bucket_server):
    for error in (ValueError(SAID[expected]), RuntimeError(SAID[expected])):
        shown = str(bucket_trouble(any_path("gs://bucket/w"), error))
        assert re.match(f"gs://bucket/w.*{expected}", shown), shown
        assert bucket_trouble("/w", error) is None
    assert bucket_trouble("gs://bucket/w", ValueError("NOT_FOUND: damaged")) is None


def test_what_a_library_would_wait_for_too_long_is_given_up(bucket_server, monkeypatch):
    monkeypatch.setattr("avd_jax.bucket_requests._PATIENCE", 0.1)
    answer = threading.Event()
    with pytest.raises(TimeoutError, match="no answer for") as caught:
        in_time("gs://bucket/w", answer.wait)
    assert "gs://bucket/w: the bucket does not answer" in str(bucket_trouble("gs://bucket/w", caught.value))
    answer.set()
    assert in_time("gs://bucket/w", lambda: 3) == in_time("/w", lambda: 3) == 3


def test_an_error_of_ours_within_another_librarys_is_told_as_it_is(bucket_server):
    theirs = ValueError("theirs")
    theirs.__cause__ = UserError("ours")
    assert str(bucket_trouble("gs://bucket/w", theirs)) == "ours"


def test_orbax_gives_up_after_minutes_and_says_what_is_missing(bucket, bucket_server, tmp_path):
    from orbax.checkpoint._src.serialization.tensorstore_utils import get_ts_context

    from avd_jax.convert import orbax_io

    for use_ocdbt in (True, False):
        told = get_ts_context(use_ocdbt=use_ocdbt)["gcs_request_retries"].to_json()
        assert told == {"max_retries": 13}  # after 1, 2, 4, 8, 16, then 32 seconds, which are its defaults
    value = np.ones((2, 3), np.float32)
    leaves = {"x": value}
    orbax_io.write_leaves(tmp_path / "x", leaves, leaves.get)
    for file in (tmp_path / "x").rglob("*"):
        if file.is_file():
            (bucket / file.relative_to(tmp_path)).upload(file)
    np.testing.assert_array_equal(dict(orbax_io.read_arrays(bucket / "x", leaves))["x"], value)
    bucket_server.faults({"match": "/o/.*/d/", "status": 401, "message": "Invalid Credentials"})
    for read in (lambda: orbax_io.read_structure(bucket / "x"), lambda: [*orbax_io.read_arrays(bucket / "x", leaves)]):
        with pytest.raises(
            UserError, match=f"{bucket}/x.*: there are no valid credentials .*Invalid Cred.*gcloud auth"
        ):
            read()
