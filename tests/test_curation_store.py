"""Finished results: found again only for the same source and settings, whole or not at all."""

import errno
import os

import pytest

from avd_jax.curation.store import Store, identity
from avd_jax.errors import UserError


def test_a_result_is_found_for_the_same_and_only_for_the_same(tmp_path):
    store, made_from = Store(tmp_path), {"source": "a.mp4", "bytes": 3, "settings": {"spans": (0.2, 0.5)}}
    store.put("analysis", "a.mp4", made_from, {"error": None, "value": float("nan")})
    assert Store(tmp_path).get("analysis", "a.mp4", made_from) == {"error": None, "value": None}  # JSON knows no NaN
    assert store.get("analysis", "a.mp4", made_from | {"bytes": 4}) is None
    assert store.get("analysis", "b.mp4", made_from) is None
    assert store.get("captions", "a.mp4", made_from) is None


def test_a_damaged_file_counts_as_missing(tmp_path):
    store = Store(tmp_path)
    store.put("analysis", "a.mp4", {}, 1)
    (file,) = tmp_path.rglob("*.json")
    for text in ("", "[]", "{", '{"made_from": {}}', "\udcff"):
        file.write_bytes(os.fsencode(text))
        assert store.get("analysis", "a.mp4", {}) is None


def test_a_changed_video_has_another_identity(tmp_path):
    video = tmp_path / "a.mp4"
    video.write_bytes(b"abc")
    before = identity("a.mp4", video)
    assert identity("a.mp4", video) == before
    os.utime(video, ns=(0, 1))
    assert identity("a.mp4", video) != before


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "the disk is full; free some space, then the same command"), (errno.EACCES, "cannot be written")],
)
def test_a_disk_that_takes_no_more_is_one_line_and_what_is_finished_stays(tmp_path, monkeypatch, number, message):
    store = Store(tmp_path)
    store.put("analysis", "a.mp4", {}, 1)

    def full(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=message):
        store.put("analysis", "b.mp4", {}, 2)
    assert store.get("analysis", "a.mp4", {}) == 1
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1
