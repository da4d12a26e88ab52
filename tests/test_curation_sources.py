"""Which videos there are: of folders and of lists in the spellings that people bring."""

import json
import os

import pytest

from avd_jax.curation.sources import find
from avd_jax.errors import UserError


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def named(sources):
    return [source.name for source in sources]


def test_a_folder_gives_its_videos_in_order_with_the_texts_beside_them(tmp_path):
    touch(tmp_path, "b.mp4", "a/c.MKV", "a/notes.txt", "d.jpg", "ü.webm")
    (tmp_path / "b.txt").write_text("A cat\nsleeps.\n")
    sources = find(tmp_path)
    assert named(sources) == ["a/c.MKV", "b.mp4", "ü.webm"]
    assert [source.caption for source in sources] == [None, "A cat sleeps.", None]
    assert sources[0].path == tmp_path / "a" / "c.MKV"
    assert not any(source.problem for source in sources)


def test_links_to_folders_are_followed_once(tmp_path):
    touch(tmp_path, "videos/z/a.mp4", "elsewhere/b.mp4", "elsewhere/deep/c.mp4")
    links = {"a": "z", "more": "../elsewhere", "z/up": "..", "again": "../elsewhere/deep", "gone": "../nowhere"}
    for name, target in links.items():
        os.symlink(target, tmp_path / "videos" / name)
    assert named(find(tmp_path / "videos")) == ["again/c.mp4", "more/b.mp4", "z/a.mp4"]


@pytest.mark.parametrize(
    "spelling", [("file", "caption"), ("video_path", "cap"), ("path", "text"), ("video", "prompt")]
)
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_list_may_bring_captions(tmp_path, spelling, kind):
    touch(tmp_path, "a.mp4", "sub/b.mp4")
    rows = [("sub/b.mp4", "A dog, running"), ("a.mp4", "")]
    if kind == "csv":
        text = ",".join(spelling) + "".join(f'\n{name},"{caption}"' for name, caption in rows)
    else:
        text = "\n".join(json.dumps(dict(zip(spelling, row, strict=True))) for row in rows)
    (tmp_path / f"list.{kind}").write_text(text)
    sources = find(tmp_path / f"list.{kind}")
    assert [(source.name, source.caption) for source in sources] == [("a.mp4", None), ("sub/b.mp4", "A dog, running")]


def test_files_that_are_missing_are_a_reason_a_row(tmp_path, monkeypatch):
    touch(tmp_path / "videos", "a.mp4")
    touch(tmp_path, "elsewhere.mp4")
    rows = ["a.mp4", "gone.mp4", "gs://bucket/c.mp4", "../elsewhere.mp4", str(tmp_path / "elsewhere2.mp4"), "."]
    (tmp_path / "videos" / "list.jsonl").write_text("\n".join(json.dumps({"file": row}) for row in rows))
    monkeypatch.chdir(tmp_path / "videos")  # a list in the current folder has no folder in its name
    problems = {source.name: source.problem for source in find("list.jsonl")}
    assert problems == {
        "a.mp4": None,
        "gone.mp4": "there is no such file",
        "gs://bucket/c.mp4": problems["gs://bucket/c.mp4"],
        str(tmp_path / "elsewhere.mp4"): None,
        str(tmp_path / "elsewhere2.mp4"): "there is no such file",
        ".": "is a folder; name its files",
    }
    assert "gs:// is not supported" in problems["gs://bucket/c.mp4"]


def test_a_name_that_is_not_utf8_is_a_reason(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"\xff.mp4")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    (source,) = find(tmp_path)
    assert source.problem == "its name is not UTF-8; rename it"
    json.dumps(source.name, ensure_ascii=False).encode()


def test_bad_input_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "a.mp4")
    texts = {
        "twice.jsonl": '{"file": "a.mp4"}\n{"file": "./a.mp4"}',
        "unnamed.jsonl": '{"fil": "a.mp4"}',
        "number.jsonl": '{"file": 7}',
        "plain.txt": "a.mp4\nb.mp4",
        "none.jsonl": "",
        "columns.csv": "file,File,caption\na.mp4,b.mp4,x\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    cases = {
        "empty": "empty: holds no videos (.avi",
        "a.mp4": "a.mp4: is no folder of videos; name the folder",
        "nowhere": "nowhere: there is no such folder of videos, or list",
        "twice.jsonl": "twice.jsonl:2: ./a.mp4 is named already, in",
        "unnamed.jsonl": "unnamed.jsonl:1: has no 'file' (did you mean 'fil'?)",
        "number.jsonl": "number.jsonl:1: 'file' is not a text",
        "plain.txt": "plain.txt: is no list of videos",
        "none.jsonl": "none.jsonl: names no videos",
        "columns.csv": "columns.csv:1: has two columns 'file'",
    }
    for name, message in cases.items():
        with pytest.raises(UserError) as error:
            find(tmp_path / name)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_a_name_that_no_file_can_have_is_one_reason(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"file": "x" * 300 + ".mp4"}))
    (source,) = find(tmp_path / "a.jsonl")
    assert source.problem == "there is no such file"


def test_an_unreadable_folder_is_one_line(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\); mend its permissions"):
        find(tmp_path)
