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
    assert read_prompts(write(tmp_path / "p.tsv", "seed\tPrompt\n1\ta cat, running\n2\ta dog\n")) == [
        "a cat, running",
        "a dog",
    ]


def test_json(tmp_path):
    assert read_prompts(write(tmp_path / "list.json", '["a cat",\n"a dog"]\n')) == ["a cat", "a dog"]
    assert read_prompts(write(tmp_path / "list.txt", '["a cat",\n"a dog"]\n')) == ["a cat", "a dog"]
    vbench = '[{"prompt_en": "a cat", "dimension": ["x"]}, {"prompt_en": "a dog", "auxiliary_info": {}}]'
    assert read_prompts(write(tmp_path / "VBench_full_info.json", vbench)) == ["a cat", "a dog"]
    assert read_prompts(write(tmp_path / "p.jsonl", '"a cat"\n{"text": "a dog", "prompt_en": "b"}')) == [
        "a cat",
        "a dog",
    ]


def test_brackets_of_prose_are_prose(tmp_path):
    text = "[close-up] a cat\n{red|blue} balloons\na [big] dog"
    assert read_prompts(write(tmp_path / "p.txt", text)) == text.split("\n")


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("p.txt", b"", "p.txt: no prompts in it"),
        ("p.txt", b" \n\n\t", "p.txt: no prompts in it"),
        ("p.csv", b"prompt\n", "p.csv: no prompts in it"),
        ("p.json", b"[]", "p.json: no prompts in it"),
        (
            "p.jsonl",
            b'{"prompt": "a"}\n["b"]\n',
            "p.jsonl:2: is no prompt; .* 'prompt', 'caption', 'text' or 'prompt_en'",
        ),
        ("p.jsonl", b'{"prompt": 3}', "p.jsonl:1: is no prompt"),
        ("p.json", b'{"prompts": ["a", "b"]}', "p.json:1: is no prompt"),
        ("p.json", b'{\n"a": 1}', "p.json:1: is no prompt"),
        ("p.json", b'["a",\n["b"]]', "p.json:2: is no prompt"),
        ("p.txt", b"[1, 2]", "p.txt:1: is no prompt"),
        ("p.txt", b"[\na cat\n]", "p.txt:1: is not JSON"),
        ("p.csv", b"words\na\n", "p.csv:2: is no prompt"),
        ("p.json", b'["a",\n"b \\ud83d"]', r"p.json:2: the prompt is no UTF-8 \(.ud83d is half a character\); mend it"),
    ],
)
def test_unusable_files(name, contents, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(contents)
    with pytest.raises(UserError, match=message) as error:
        read_prompts(path)
    assert "\n" not in str(error.value)


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
