"""The tokenizer against sentencepiece (golden file by make_umt5_fixture.py), and what can be wrong with its file."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from avd_jax.data.tokenizer import Tokenizer, clean
from avd_jax.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN = json.loads((FIXTURES / "tokenizer_golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_path(FIXTURES)


def test_tokens_of_sentencepiece(tokenizer):
    input_ids, attention_mask = tokenizer(GOLDEN["texts"])
    assert input_ids.shape == attention_mask.shape == (len(GOLDEN["texts"]), 512)
    assert input_ids.dtype == attention_mask.dtype == np.int32
    for ids, mask, expected in zip(input_ids, attention_mask, GOLDEN["input_ids"], strict=True):
        np.testing.assert_array_equal(ids, expected + [0] * (512 - len(expected)))
        np.testing.assert_array_equal(mask, np.arange(512) < len(expected))


def test_ends_with_the_end_token_also_when_cut(tokenizer):
    input_ids, attention_mask = tokenizer(["fox " * 3000, "fox", ""])
    last = attention_mask.sum(axis=1) - 1
    assert last[0] == 511
    assert last[2] == 0
    np.testing.assert_array_equal(input_ids[np.arange(3), last], 1)


def test_a_text_does_not_depend_on_its_batch(tokenizer):
    together, _ = tokenizer(GOLDEN["texts"])
    alone = np.concatenate([tokenizer([text])[0] for text in GOLDEN["texts"]])
    np.testing.assert_array_equal(together, alone)
    assert tokenizer([])[0].shape == (0, 512)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a \n\t b\u3000c ", "a b c"),
        ("&amp;amp;amp;lt;", "<"),
        ("<i>&amp;lt;", "<i><"),  # ftfy leaves entities alone beside a tag
        ("<i>&amp;amp;lt;", "<i>&lt;"),
        ("caf\u00c3\u00a9", "café"),
        ("x\ud83dy", "x\ufffdy"),
        ("it\u2019s", "it's"),
        (" \n ", ""),
    ],
)
def test_clean(text, cleaned):
    assert clean(text) == cleaned


def test_padding_and_truncation_in_the_file_are_overridden(tokenizer, tmp_path):
    entries = json.loads((FIXTURES / "tokenizer.json").read_text())
    entries["truncation"] = {"max_length": 4, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    entries["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None,
        "pad_id": 2, "pad_type_id": 0, "pad_token": "<unk>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(entries))
    np.testing.assert_array_equal(Tokenizer.from_path(tmp_path)(GOLDEN["texts"]), tokenizer(GOLDEN["texts"]))


def test_save_keeps_every_byte(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "weights" / "tokenizer")
    copy = tmp_path / "weights" / "tokenizer" / "tokenizer.json"
    assert copy.read_bytes() == (FIXTURES / "tokenizer.json").read_bytes()
    np.testing.assert_array_equal(Tokenizer.from_path(copy)(["a fox"]), tokenizer(["a fox"]))


def test_no_file(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such file"):
        Tokenizer.from_path(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"tokenizer.json: no such file; a tokenizer folder must hold tokenizer.json$"):
        Tokenizer.from_path(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"which cannot be made from spiece.model here$"):
        Tokenizer.from_path(tmp_path)


def without_end(entries):
    entries["post_processor"] = None


def without_padding_token(entries):
    entries["added_tokens"] = entries["added_tokens"][1:]
    entries["model"]["vocab"][0][0] = "[PAD]"


@pytest.mark.parametrize("change", [without_end, without_padding_token])
def test_another_models_tokenizer(change, tmp_path):
    entries = json.loads((FIXTURES / "tokenizer.json").read_text())
    change(entries)
    (tmp_path / "tokenizer.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match=r"tokenizer.json: not umT5's tokenizer"):
        Tokenizer.from_path(tmp_path)


@pytest.mark.parametrize("contents", [b"", b"{}", b"\x00\xff", b'{"version": "1.0", "model": {"type": "Unigr'])
def test_corrupt_file(contents, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(contents)
    with pytest.raises(UserError, match=r"tokenizer.json: not a readable tokenizer \(") as error:
        Tokenizer.from_path(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("texts", ["one string", [b"bytes"], [None]])
def test_not_a_list_of_strings(texts, tokenizer):
    with pytest.raises(UserError, match="a list of strings"):
        tokenizer(texts)


def test_what_is_unknown_is_told(tokenizer):
    """umT5's own spells what it does not know in bytes; that of the small world does not."""
    tiny, notes = Tokenizer.from_path(Path(__file__).parents[1] / "weights" / "tiny" / "tokenizer"), []
    tokenizer.tell_what_is_cut(["fox \u2603"], note=notes.append)
    tiny.tell_what_is_cut(["a disc"], note=notes.append)
    assert notes == []
    tiny.tell_what_is_cut(["fox \u2603", "\u2603 fox", "fox"], note=notes.append)
    assert notes == ["unknown to the tokenizer: '\u2603', which the model does not read"]


def test_what_is_cut_is_told_in_one_line(tokenizer):
    notes = []
    tokenizer.tell_what_is_cut(["fox " * 200, "", "fox"], note=notes.append)
    length = len(tokenizer._tokenizer.encode("fox " * 599 + "fox").ids)
    tokenizer.tell_what_is_cut([], note=notes.append)
    assert notes == []
    long = "fox " * 599 + "fox"
    tokenizer.tell_what_is_cut(["fox", long, long], note=notes.append)
    tokenizer.tell_what_is_cut([long, *("fox " * n for n in (520, 530))], note=notes.append)
    tokenizer.tell_what_is_cut(["fox fox fox"], 2, notes.append)
    shown = "fox " * 15
    assert notes[0] == f"cut off: {length - 512:,} of {length:,} tokens of '{shown}...'; the model reads the first 512"
    assert notes[1].endswith(f"'{shown}...', the longest of 3 such texts; the model reads the first 512")
    assert notes[2].endswith("tokens of 'fox fox fox...'; the model reads the first 2")
    assert len(notes) == 3


def test_cutting_is_what_the_library_does(tokenizer):
    library = tokenizers.Tokenizer.from_str(tokenizer.serialized.decode())
    library.no_padding()
    library.enable_truncation(512)
    for count in (250, 511, 512, 513, 600):
        text = " ".join(f"fox{i}" for i in range(count))
        ids, mask = tokenizer([text])
        assert ids[0, : mask.sum()].tolist() == library.encode(text).ids
