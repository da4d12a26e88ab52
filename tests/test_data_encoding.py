"""The text encoder and the VAE compiled: what they give, when they are on the device, and how they are identified."""

import gc
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from test_data_encode_sets import SIZE, pool, shape_clips

from avd_jax.data import encoding, shapes_world
from avd_jax.data.encode_sets import encode_videos


class Toy(nnx.Module):
    """Stands in for both networks: `__call__` is the text encoder's, `encode` the VAE's."""

    def __init__(self, seed=0, dtype=jnp.float32):
        key = jax.random.key(seed)
        # Values that bfloat16 holds exactly, as those of a bfloat16 file loaded as float32 are.
        self.table = nnx.Param(jax.random.normal(key, (100, 6), jnp.bfloat16).astype(dtype))
        self.bias = nnx.Param(jnp.full((6,), 0.5, dtype))

    def __call__(self, ids, mask):
        return (self.table[...][ids] + self.bias[...]) * mask[..., None]

    def encode(self, video, *, memory_gib):
        return pool(video)

    def decode(self, latents, *, memory_gib):
        return self.table[...][latents]


def tokenize(texts):
    ids = np.zeros((len(texts), 12), np.int32)
    mask = np.zeros((len(texts), 12), np.int32)
    for i, text in enumerate(texts):
        words = [len(word) for word in text.split()][:12]
        ids[i, : len(words)], mask[i, : len(words)] = words, 1
    return ids, mask


def test_network_wrappers():
    toy = Toy()
    text = encoding.text_encoder(toy, tokenize)
    assert text.text_len == 12
    first, second = text.encode(["one three", "four"])
    assert (first.shape, second.shape) == ((2, 6), (1, 6))
    np.testing.assert_allclose(
        first.astype(np.float32), np.asarray(toy.table[...])[[3, 5]] + 0.5, rtol=2**-8, atol=1e-6
    )
    vae = encoding.video_encoder(toy)
    video = shapes_world.clip(0, **SIZE)[0][None]
    np.testing.assert_allclose(np.asarray(vae.encode(video), np.float32), pool(video), rtol=2**-7)


def test_a_network_that_is_opened_again_is_not_compiled_again():
    """An evaluation makes several sets of videos, and decodes all of them with the same VAE."""

    def compiled(program_of, *inputs):
        graphdef, state = nnx.split(Toy())
        return program_of(graphdef).trace(state, *inputs).lower().compile().runtime_executable()

    ids = jnp.zeros((8, 12), jnp.int32)
    decoder = partial(encoding.decoder_program, platform="cpu")
    assert compiled(encoding.text_program, ids, ids) is compiled(encoding.text_program, ids, ids)
    assert compiled(decoder, ids) is compiled(decoder, ids)
    assert compiled(decoder, ids) is not compiled(partial(decoder, memory_gib=1.0), ids)


def test_text_encoder_and_vae_are_not_on_the_device_together(tmp_path):
    """umT5-XXL and the VAE's activations are each most of a 16 GiB device."""
    toy, table, seen = Toy(), (100, 6), {"text": set(), "vae": set()}
    expected = encoding.text_encoder(Toy(), tokenize).encode(["one three"])[0]

    def on_device():
        return sum(array.shape == table for array in jax.live_arrays())

    gc.collect()  # what other tests left in cycles would go while this one counts
    before = on_device() - 1  # what they hold stays

    def noting(ids):
        seen["text"].add(on_device() - before)
        return tokenize(ids)

    def encode(video):
        if isinstance(video, np.ndarray):
            seen["vae"].add(on_device() - before)
        return pool(video)

    text = encoding.text_encoder(toy, noting, takes_turns=True)
    seen["text"].clear()
    vae = encoding.VideoEncoder(encode, fingerprint="vae")
    encode_videos(shape_clips(5), tmp_path / "set", vae=vae, text=text, fps=16.0, **SIZE, batch_size=2, shard_size=2)
    assert seen == {"text": {1}, "vae": {0}}
    with text.at_work():
        np.testing.assert_array_equal(text.encode(["one three"])[0], expected)


def test_fingerprint_tells_weights_not_types():
    assert encoding.fingerprint(Toy(0)) == encoding.fingerprint(Toy(0, jnp.bfloat16))
    assert encoding.fingerprint(Toy(0)) != encoding.fingerprint(Toy(1))
    changed = Toy(0)
    changed.bias[...] = jnp.full((6,), 0.25)
    assert encoding.fingerprint(Toy(0)) != encoding.fingerprint(changed)
