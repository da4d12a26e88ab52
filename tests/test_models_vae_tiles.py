"""The autoencoder in tiles against the whole picture, where tiles lie, and how many are chosen for a memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_models_wan_vae import tiny_vae

from avd_jax.errors import UserError
from avd_jax.models import wan_vae
from avd_jax.models.vae_tiles import GIB, Pass, Side, reach
from avd_jax.models.wan_vae import WanVAE, WanVAEConfig, computing_in


@pytest.fixture(scope="module")
def tiny():
    return tiny_vae()


def latents_of(frames, height, width):
    return np.random.default_rng(1).normal(size=(1, frames, height, width, 2)).astype(np.float32)


def assert_same(ours, whole):
    """Closer than the outermost neighbours' weight: see the test of a seam."""
    np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=2e-6)


def test_tiles_make_what_the_whole_picture_is(tiny):
    video = np.random.default_rng(1).uniform(-1, 1, (1, 5, 36, 28, 3)).astype(np.float32)
    assert_same(tiny.encode(video, tiles=(3, 2)), tiny.encode(video))
    latents = latents_of(3, 18, 14)
    assert_same(tiny.decode(latents, tiles=(3, 2)), tiny.decode(latents))


def test_one_frame_narrower_than_what_a_tile_needs_of_its_neighbours(tiny):
    latents = latents_of(1, 18, 3)
    assert_same(tiny.decode(latents, tiles=(2, 3)), tiny.decode(latents))


def test_with_one_neighbour_less_a_seam_would_show(tiny, monkeypatch):
    latents, (before, after) = latents_of(1, 18, 3), reach(tiny.decoder.stages()[1], 1)
    monkeypatch.setattr(wan_vae, "reach", lambda layers, unit: (before - 1, after - 1))
    assert np.abs(tiny.decode(latents, tiles=(2, 1)) - tiny.decode(latents)).max() > 2e-5


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 2), (4, 5), (7, 7)])
@pytest.mark.parametrize("size", [1, 5, 14, 15, 60, 90])
def test_every_place_is_made_last_by_a_tile_that_has_its_neighbours(size, before, after):
    for tiles in range(1, 9):
        side, last = Side(size, tiles, before, after), np.full(size, -1)
        places = side.places()
        for tile, (start, done) in enumerate(places):
            assert 0 <= start <= size - side.extent
            last[start + done : start + side.extent] = tile
        for place, tile in enumerate(last):
            start = places[tile][0]
            assert max(place - before, 0) >= start
            assert min(place + after, size - 1) < start + side.extent


@pytest.fixture(scope="module")
def full():
    return nnx.eval_shape(lambda: WanVAE(WanVAEConfig(), nnx.Rngs(0)))


def chosen(vae, direction, height, width, memory_gib, monkeypatch):
    """Return the tiles of a clip of 81 frames, and how much of its area is made, without tracing the tiles."""
    found = []

    def run(self, tiles=(1, 1)):
        if self.working:
            found.append((tiles, np.prod([side.tiles * side.extent / side.size for side in self._sides(tiles)])))
        return jnp.zeros(self.result.shape, self.result.dtype)

    monkeypatch.setattr(Pass, "run", run)
    shape = (1, 81, height, width, 3) if direction == "encode" else (1, 21, height // 8, width // 8, 16)
    graphdef, state = nnx.split(vae)

    def code(state, clip):
        vae = nnx.merge(graphdef, state)
        if direction == "decode":
            vae = computing_in(vae, jnp.bfloat16)
        return getattr(vae, direction)(clip, memory_gib=memory_gib)

    jax.eval_shape(code, state, jax.ShapeDtypeStruct(shape, jnp.float32))
    return found[0]


@pytest.mark.parametrize(
    ("direction", "size", "tiles", "area"),
    [
        ("decode", (480, 832), (1, 1), 1),
        ("decode", (720, 1280), (1, 3), 1.19),
        ("encode", (480, 832), (1, 2), 1.1),
        ("encode", (720, 1280), (2, 4), 1.31),
    ],
    ids=str,
)
def test_tiles_of_wans_sizes_in_8_gib(full, direction, size, tiles, area, monkeypatch):
    """What `benchmarks/vae_memory.py` compiles for a TPU."""
    found, made = chosen(full, direction, *size, 8, monkeypatch)
    assert found == tiles
    assert made <= area


def test_a_memory_that_no_tiles_fit(full, monkeypatch):
    assert chosen(full, "decode", 720, 1280, 40, monkeypatch)[0] == (1, 1)
    with pytest.raises(UserError, match=r"the VAE takes .* GiB .* 1 x 720x1280 pixels .* and 1.5 are granted"):
        chosen(full, "decode", 720, 1280, 1.5, monkeypatch)


def test_the_tiles_that_are_tried_have_the_best_among_them(monkeypatch):
    clip = jax.ShapeDtypeStruct((1, 1, 60, 104, 4), jnp.float32)
    one = Pass(clip, lambda frames, past: (frames, frames), reach=(2, 3), working=1e5)
    memories = [one.needed(tiles) / GIB for tiles in ((1, 1), (1, 2), (3, 2), (5, 7), (30, 60))]
    few = [one.tiles_within(gib, 0) for gib in memories]
    monkeypatch.setattr(Pass, "_counts", lambda self, size: range(1, size + 1))
    assert few == [one.tiles_within(gib, 0) for gib in memories]
    assert len(set(few)) > 3


def test_a_picture_of_any_size_is_refused_soon(full, monkeypatch):
    with pytest.raises(UserError, match="1 x 160000x160000 pixels"):
        chosen(full, "decode", 160_000, 160_000, 8, monkeypatch)


def test_how_far_layers_see(full):
    encoder, decoder = full.encoder.stages()[0], full.decoder.stages()[1]
    assert reach(encoder, 8) == (4, 5)  # 29 and 36 pixels
    assert reach(decoder, 1) == (7, 7)


@pytest.mark.parametrize("tiles", [(0, 1), (-1, 2), (2,), "22", (2.0, 1), [2, 1]])
def test_tiles_that_are_none(tiny, tiles):
    with pytest.raises(UserError, match="give how many in height and width"):
        tiny.decode(latents_of(1, 2, 2), tiles=tiles)
