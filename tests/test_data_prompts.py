"""Prompt lists in every layout that users have, and file names for any prompt."""

import re

import pytest

from avd_jax.data.prompts import WAN_NEGATIVE_PROMPT, file_stem, read_prompts
from avd_jax.errors import UserError

PROMPTS = ["A fox, running", "“Quoted” and/or not", "A fox, running", "红狐", "a\u2028b\x0cc"]


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_one_prompt_a_line(tmp_path):
    text = "\n\n  ".join(prompt + " \t" for prompt in PROMPTS) + "\n \n"
    assert read_prompts(write(tmp_path / "p.txt", text)) == PROMPTS
    assert read_prompts(str(write(tmp_path / "dos", "\ufeff" + text.replace("\n", "\r\n")))) == PROMPTS


def test_jsonl(tmp_path):
    text = '{"prompt": " a \\n b ", "seed": 1}\n\n{"caption": "c", "prompt": null}\n{"prompt": " "}\n'
    assert read_prompts(write(tmp_path / "p.jsonl", text)) == ["a \n b", "c"]


def test_csv(tmp_path):
    text = 'file,caption\r\n1.mp4,"a, ""b"""\r\n2.mp4,c\r\n'
    assert read_prompts(write(tmp_path / "p.CSV", text)) == ['a, "b"', "c"]


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("p.txt", b"", "p.txt: no prompts in it"),
        ("p.txt", b" \n\n\t", "p.txt: no prompts in it"),
        ("p.csv", b"prompt\n", "p.csv: no prompts in it"),
        ("p.txt", b"\x89PNG\r\n\x1a\n", r"p.txt: not UTF-8 text \(byte 0\)"),
        ("p.txt", "été".encode("latin-1"), r"p.txt: not UTF-8 text \(byte 0\)"),
        ("p.txt", b"a\x00b", "p.txt: a binary file"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"', "p.jsonl: line 2 is not JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n"b"\n', "p.jsonl: line 2 has no text field 'prompt' or 'caption'"),
        ("p.jsonl", b'{"prompt": 3}', "p.jsonl: line 1 has no text field"),
        ("p.csv", b"text\na\n", "p.csv: line 2 has no text field"),
        ("p.csv", b"prompt\n" + b"a" * 200_000, "p.csv: line 2 is not CSV"),
    ],
)
def test_unusable_files(name, contents, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(contents)
    with pytest.raises(UserError, match=message) as error:
        read_prompts(path)
    assert "\n" not in str(error.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"none.txt: cannot be read \(No such file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(UserError, match="a folder; name a text file"):
        read_prompts(tmp_path)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "...",
        "-rf /",
        "../../etc/passwd",
        "红狐",
        'a/b\\c:d*e?f"g<h>i|j\nk\0l',
        "\ud83d",
        "x" * 5000,
        "CON",
        *PROMPTS,
    ],
)
def test_file_stems_are_safe(prompt):
    for stem in (file_stem(prompt), file_stem(prompt, 3, -1)):
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{9,90}", stem), stem
        assert stem != "CON"


def test_file_stems_are_unique_and_the_same_every_time():
    similar = ["a" * 100, "a" * 101, "a/b", "a b", "a  b", "é", "e", "", " ", "红", "狐"]
    stems = [file_stem(prompt, seed) for prompt in similar for seed in (0, 1, -1)]
    assert len({stem.lower() for stem in stems}) == len(stems)
    # as `printf 'A fox.' | sha256sum` has it
    assert file_stem("A fox.", 7) == "A_fox-e58a49bfc1-7"


def test_negative_prompt_is_wans():
    parts = WAN_NEGATIVE_PROMPT.split("\uff0c")
    assert len(parts) == 28
    assert (parts[0], parts[13], parts[-1]) == ("色调艳丽", "JPEG压缩残留", "倒着走")
    assert not re.search(r"\s", WAN_NEGATIVE_PROMPT)
