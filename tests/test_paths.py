"""What a path may be: local ones, `~` and `file://`; other schemes are refused by name."""

import os
import sys
from pathlib import Path

import pytest

from avd_jax.errors import UserError
from avd_jax.paths import any_path, is_bucket, local_path


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("scheme", ["gs", "s3", "hf", "GS", "https", "abfss", "git+ssh"])
def test_a_scheme_is_refused_by_its_name(scheme):
    for path in (f"{scheme}://bucket/x", f"{scheme}:/bucket/x", Path(f"{scheme}://bucket/x")):
        with pytest.raises(UserError, match=f"(?i){scheme.replace('+', '.')}:// is not supported") as error:
            local_path(path)
        assert "\n" not in str(error.value)


def test_a_bucket_is_one_of_the_paths(home):
    pytest.importorskip("gcsfs", reason="an extra")
    for written in ("gs://bucket/x/y", "gs:/bucket/x/y", "GS://bucket/x/y/", Path("gs://bucket/x/y")):
        assert is_bucket(written)
        path = any_path(written)
        assert (str(path), os.fspath(path)) == ("gs://bucket/x/y",) * 2
        assert any_path(path) == path
        assert str(path.parent / f"{path.name}.z") == str(path.with_suffix(".z")) == "gs://bucket/x/y.z"
    assert any_path("~/x") == home / "x"
    assert not is_bucket("a/gs://bucket")
    with pytest.raises(UserError, match="names no bucket"):
        any_path("gs://")
    with pytest.raises(UserError, match="only local paths and gs:// are"):
        any_path("s3://bucket/x")


def test_what_buckets_need_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r'gs://bucket/x: buckets need more packages; pip install -e "\.\[gcs\]"'):
        any_path("gs://bucket/x")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("runs/x", "runs/x"),
        ("/data/x", "/data/x"),
        ("./x/", "x"),
        ("", "."),
        ("a:b/c", "a:b/c"),
        ("C:/videos", "C:/videos"),
        ("file:///data/a%20b", "/data/a b"),
        ("file:/data/x#1?2", "/data/x#1?2"),
        ("FILE://localhost/data", "/data"),
        ("a~", "a~"),
        ("x/~", "x/~"),
    ],
)
def test_local_paths(written, meant):
    assert local_path(written) == Path(meant)
    assert local_path(Path(local_path(written))) == Path(meant)


def test_the_home_folder(home):
    assert local_path("~") == home
    assert local_path("~/x/y") == local_path(Path("~/x/y")) == home / "x" / "y"
    with pytest.raises(UserError, match=r"no home folder of ~nobody-here; .* write \./~nobody-here"):
        local_path("~nobody-here/x")


def test_names_that_look_like_more_can_be_written(home, monkeypatch):
    monkeypatch.chdir(home)
    for name in ("~nobody-here", "gs:/x"):
        path = local_path(f"./{name}")
        assert path == local_path(path) == home / name
        assert local_path(os.fspath(path)) == path


def test_another_machine():
    with pytest.raises(UserError, match="is on another machine; a local path has three slashes"):
        local_path("file://server/data")
