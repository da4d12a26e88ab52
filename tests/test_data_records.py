"""Lists in files, whatever their kind, and files that only look like one."""

import re

import pytest

from avd_jax.data.records import read_records, read_text
from avd_jax.errors import UserError

COLUMNS = ("prompt", "text")


def read(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8"))
    records = read_records(path, COLUMNS)
    return records and [(record.where.removeprefix(f"{tmp_path}/"), record.value) for record in records]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.json", '[\n  "a",\n\n  {"prompt": "b [x]"},\n 3]', [(2, "a"), (4, {"prompt": "b [x]"}), (5, 3)]),
        ("a.json", "[]", []),
        ("a.json", '{"prompt": "a"}\n{"prompt": "b"}\n', [(1, {"prompt": "a"}), (2, {"prompt": "b"})]),
        ("a.json", '\n{\n "prompt": "a"}', [(2, {"prompt": "a"})]),
        ("a.jsonl", '"a"\n\n["b"]\r\n', [(1, "a"), (3, ["b"])]),
        ("a.jsonl", '["a", "b"]', [(1, "a"), (1, "b")]),
        ("a.txt", '["a",\n"b"]', [(1, "a"), (2, "b")]),
        ("a", '{"prompt": "a"}\n{"prompt": "b"}\n', [(1, {"prompt": "a"}), (2, {"prompt": "b"})]),
        (
            "a.CSV",
            'n,prompt\n1,"a, ""b""\nc"\n\n2,d\n3\n',
            [(2, {"n": "1", "prompt": 'a, "b"\nc'}), (5, {"n": "2", "prompt": "d"}), (6, {"n": "3", "prompt": None})],
        ),
        ("a.csv", "n;prompt\n1;a, b\n", [(2, {"n": "1", "prompt": "a, b"})]),
        ("a.csv", "\n Prompt \na\n", [(3, {" Prompt ": "a"})]),
        ("a.tsv", "n\tprompt\n1\ta, b\u2028c\n", [(2, {"n": "1", "prompt": "a, b\u2028c"})]),
        ("a.txt", "n\tprompt\n1\ta\n", [(2, {"n": "1", "prompt": "a"})]),
    ],
)
def test_lists(tmp_path, name, text, expected):
    assert read(tmp_path, name, text) == [(f"{name}:{line}", value) for line, value in expected]


@pytest.mark.parametrize(
    "text",
    [
        "a cat\na dog",
        "[close-up] a cat\n[wide] a dog",
        "[close-up] a cat [end]",
        "{red|blue} balloons",
        '"a cat"\n"a dog"',
        "a list [of] things",
        "prompt",
        "prompt, please: a cat",
        "- a cat\n- a dog",
        "",
    ],
)
def test_plain_text(tmp_path, text):
    assert read(tmp_path, "a.txt", text) is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '["a",\n"b"', "a.json:1: is not JSON"),
        ("a.json", "a cat", "a.json:1: is not JSON"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt"', "a.jsonl:2: is not JSON (Expecting ':' delimiter, column 10); write"),
        ("a.json", "[" * 100_000, "a.json:1: is no list of texts"),
        ("a.txt", '[\n"a cat",\n"a dog"\n', "a.txt:1: is not JSON"),
        ("a.txt", "['a cat', 'a dog']", "a.txt:1: is not JSON"),
        ("a.txt", "[a cat,\na dog]", "a.txt:1: is not JSON"),
        ("a.txt", "[a cat", "a.txt:1: is not JSON"),
        ("a.txt", 'a cat\n{"prompt": "a dog"}', "a.txt:1: is not JSON"),
        ("a.csv", "prompt\na cat, running\n", "a.csv:2: has 2 cells, the header 1; quote texts with commas"),
        ("a.tsv", 'prompt\n"a cat\n', "a.tsv:2: is not CSV"),
        ("a.csv", "prompt\n" + "a" * 200_000, "a.csv:2: is not CSV"),
    ],
)
def test_what_is_neither_is_refused(tmp_path, name, text, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read(tmp_path, name, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"\x89PNG\r\n\x1a\n", r"is not UTF-8 text \(byte 0\)"),
        ("été".encode("latin-1"), r"is not UTF-8 text \(byte 0\)"),
        (b"\xed\xa0\xbd", r"is not UTF-8 text \(byte 0\)"),
        ("a cat".encode("utf-16"), r"is not UTF-8 text \(byte 0\)"),
        (b"a\x00b", "is a binary file"),
    ],
)
def test_what_is_no_text(tmp_path, contents, message):
    (tmp_path / "a.txt").write_bytes(contents)
    with pytest.raises(UserError, match=message):
        read_text(tmp_path / "a.txt")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"none.txt: cannot be read \(No such file"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(UserError, match="is a folder; name a text file"):
        read_text(tmp_path)
    with pytest.raises(UserError, match="s3:// is not supported"):
        read_text("s3://bucket/a.txt")
