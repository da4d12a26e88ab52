"""Embeddings that are kept between calls: the same to the last bit, or made anew."""

import os
import shutil

import ml_dtypes
import numpy as np
import pytest
from generation_cases import UMT5_SIZES, InMemory

from avd_jax.convert.architectures import UMT5
from avd_jax.generation.prompt_cache import PromptCache, cache_key, default_folder

TEXT = "“three/four”\u2028\U0001f43c"
EMBEDS = np.random.default_rng(0).standard_normal((5, 8)).astype(ml_dtypes.bfloat16)


@pytest.fixture
def cache(tmp_path):
    cache = PromptCache(tmp_path / "cache", "key")
    cache.keep(TEXT, EMBEDS)
    return cache


def files(tmp_path):
    return list((tmp_path / "cache").rglob("*.safetensors"))


def test_what_is_kept_comes_back(cache, tmp_path):
    again = PromptCache(tmp_path / "cache", "key").get(TEXT)
    assert again.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(again, EMBEDS)
    assert cache.get(f"{TEXT} ") is None
    assert PromptCache(tmp_path / "cache", "other").get(TEXT) is None


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: bytes(len(data)),
        lambda data: flipped(data, len(data) - 1),  # a value
        lambda data: flipped(data, len(data) // 2),
        lambda data: data.replace(b'"prompt_embeds"', b'"prompt_embedz"'),
        lambda data: data.replace(b"[5,8]", b"[8,5]"),
    ],
)
def test_a_damaged_file_is_made_anew(cache, tmp_path, damage):
    (file,) = files(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    assert cache.get(TEXT) is None
    cache.keep(TEXT, EMBEDS)
    np.testing.assert_array_equal(cache.get(TEXT), EMBEDS)


def test_another_texts_file_is_not_taken(cache, tmp_path):
    cache.keep("other", EMBEDS)
    one, two = files(tmp_path)
    shutil.copy(one, two)
    assert sorted(cache.get(text) is None for text in (TEXT, "other")) == [False, True]


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    cache = PromptCache(tmp_path / "file" / "cache", "key")
    cache.keep(TEXT, EMBEDS)
    assert cache.get(TEXT) is None


def test_the_key_is_of_all_that_decides_an_embedding():
    def weights(seed=0, **changed):
        made = InMemory(UMT5, UMT5_SIZES, seed)
        made._values |= {path: made._values[path] + change for path, change in changed.items()}
        return made

    common = {"tokenizer": "t", "dtype": "float32"}
    keys = [
        cache_key(weights(), **common),
        cache_key(weights(1), **common),
        # As a fine-tune through low-rank factors would change it.
        cache_key(weights(**{"blocks.attn.q.kernel": 0.1}), **common),
        cache_key(weights(), **common | {"tokenizer": "u"}),
        cache_key(weights(), **common | {"dtype": "bfloat16"}),
    ]
    assert len(set(keys)) == len(keys)
    assert cache_key(weights(), **common) == keys[0]


def test_the_key_is_another_if_a_file_was_written_anew(tmp_path):
    """A fingerprint reads few values of large leaves: a change elsewhere must not be missed."""
    weights, common = InMemory(UMT5, UMT5_SIZES), {"tokenizer": "t", "dtype": "float32"}
    weights.files = (tmp_path / "weights",)
    keys = []
    for time in (1, 2):
        weights.files[0].write_bytes(b"...")
        os.utime(weights.files[0], (time, time))
        keys.append(cache_key(weights, **common))
    assert keys[0] != keys[1]


def test_the_default_folder_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "avd_jax" / "prompts"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/x")
    assert str(default_folder()) == "/home/x/.cache/avd_jax/prompts"
