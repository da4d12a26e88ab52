"""The autoencoder against diffusers' (golden file by make_vae_fixture.py), its invariants, tables and configs."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from avd_jax.convert import engine, load_vae, vae_rules
from avd_jax.convert.state import flat_state, from_flat
from avd_jax.data import shapes_world
from avd_jax.errors import UserError
from avd_jax.models import wan_vae
from avd_jax.models.wan_vae import WanVAE, WanVAEConfig, computing_in

GOLDEN = np.load(Path(__file__).parent / "fixtures" / "vae_golden.npz")
CONFIG_JSON = json.loads(str(GOLDEN["config_json"]))
CONFIG = vae_rules.config_from_diffusers(CONFIG_JSON)
DIFFUSERS = {name.removeprefix("weights/"): GOLDEN[name] for name in GOLDEN if name.startswith("weights/")}
NATIVE = {native: DIFFUSERS[key] for key, native in json.loads(str(GOLDEN["native_keys"])).items()}
NATIVE_SHAPES = {key: tensor.shape for key, tensor in NATIVE.items()}
LAYOUTS = {"native": (NATIVE, vae_rules.native_rules), "diffusers": (DIFFUSERS, vae_rules.diffusers_rules)}

# Every kind of layer, in the fewest of them: halves height, width and frames once.
TINY = WanVAEConfig(
    base_dim=4,
    z_dim=2,
    dim_mult=(1, 2),
    num_res_blocks=1,
    temporal_downsample=(True,),
    latents_mean=(0.5, -1.0),
    latents_std=(2.0, 0.5),
)


def abstract(config, **options):
    return nnx.split(nnx.eval_shape(lambda: WanVAE(config, nnx.Rngs(0), **options)))


def vae_with(tensors, rules):
    graph, state = abstract(CONFIG)
    leaves = flat_state(state)
    pieces = engine.resolve(rules, {key: tensor.shape for key, tensor in tensors.items()}, leaves, name="test")
    arrays = dict(engine.leaves_from_torch(pieces, leaves, lambda key, rows: tensors[key]))
    return nnx.merge(graph, from_flat(state, {path: jnp.asarray(array) for path, array in arrays.items()}))


def tiny_vae(config=TINY, **options):
    graph, state = abstract(config, **options)
    rng = np.random.default_rng(0)
    fan_in = {path: np.prod(leaf.shape[:-1]) for path, leaf in flat_state(state).items()}
    drawn = {
        path: jnp.asarray(rng.normal(path.endswith("scale"), fan_in[path] ** -0.5, leaf.shape), leaf.dtype)
        for path, leaf in flat_state(state).items()
    }
    return nnx.merge(graph, from_flat(state, drawn))


@pytest.fixture(scope="module")
def tiny():
    return tiny_vae()


def random_video(frames):
    return np.random.default_rng(1).uniform(-1, 1, (2, frames, 4, 6, 3)).astype(np.float32)


def relative_error(ours, theirs):
    """Root mean square, since the norm of three channels that are all near zero amplifies their rounding."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2))


def test_parameters_of_the_full_size():
    _, state = abstract(WanVAEConfig())
    assert sum(leaf.size for leaf in flat_state(state).values()) == 126_892_531


@pytest.mark.parametrize("layout", LAYOUTS)
def test_latents_and_frames_of_diffusers(layout):
    tensors, rules = LAYOUTS[layout]
    vae = vae_with(tensors, rules(CONFIG))
    latents = vae.encode(GOLDEN["video"].astype(np.float32))
    assert latents.dtype == jnp.float32
    assert relative_error(latents, GOLDEN["latents"]) < 2e-5
    decoded = vae.decode(GOLDEN["latents"])
    assert decoded.dtype == jnp.float32
    assert relative_error(decoded, GOLDEN["decoded"]) < 2e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_lead_back_to_the_file(layout):
    tensors, rules = LAYOUTS[layout]
    leaves = flat_state(nnx.split(vae_with(tensors, rules(CONFIG)))[1])
    exported = dict(engine.tensors_to_torch(rules(CONFIG), ((path, np.asarray(leaf)) for path, leaf in leaves.items())))
    assert exported.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(exported[key], tensor)


@pytest.mark.parametrize("config", [WanVAEConfig(), TINY], ids=["wan", "tiny"])
@pytest.mark.parametrize("rules", [vae_rules.native_rules, vae_rules.diffusers_rules])
def test_every_leaf_has_one_key(config, rules):
    _, state = abstract(config)
    leaves = flat_state(state)
    assert len(dict(engine.source_shapes(rules(config), leaves))) == len(rules(config)) == len(leaves)


@pytest.mark.parametrize("frames", [1, 5])
def test_sizes(tiny, frames):
    latents = tiny.encode(random_video(frames))
    assert latents.shape == (2, 1 + (frames - 1) // 2, 2, 3, 2)
    assert tiny.decode(latents).shape == (2, frames, 4, 6, 3)


def test_frames_see_earlier_ones_only(tiny):
    video = random_video(5)
    latents = np.asarray(tiny.encode(video))
    changed = video.copy()
    changed[:, 2] += 1  # of the second latent frame
    difference = np.abs(tiny.encode(changed) - latents).max(axis=(0, 2, 3, 4))
    assert difference[0] == 0
    assert (difference[1:] > 1e-4).all()
    np.testing.assert_allclose(tiny.encode(video[:, :1]), latents[:, :1], atol=1e-5)

    decoded = np.asarray(tiny.decode(latents))
    changed = latents.copy()
    changed[:, 1] += 1
    difference = np.abs(tiny.decode(changed) - decoded).max(axis=(0, 2, 3, 4))
    assert difference[0] == 0
    assert (difference[1:] > 1e-4).all()
    np.testing.assert_allclose(tiny.decode(latents[:, :1]), decoded[:, :1], atol=1e-5)


def test_examples_of_a_batch_are_apart(tiny):
    video = random_video(5)
    latents = np.asarray(tiny.encode(video))
    np.testing.assert_allclose(tiny.encode(video[::-1]), latents[::-1], atol=1e-5)
    np.testing.assert_allclose(tiny.decode(latents[::-1]), tiny.decode(latents)[::-1], atol=1e-5)


def test_latents_are_normalised(tiny):
    plain = tiny_vae(dataclasses.replace(TINY, latents_mean=(0.0, 0.0), latents_std=(1.0, 1.0)))
    video = random_video(1)
    latents, raw = tiny.encode(video), plain.encode(video)
    np.testing.assert_allclose(latents, (raw - jnp.array([0.5, -1.0])) / jnp.array([2.0, 0.5]), atol=1e-5)
    np.testing.assert_allclose(tiny.decode(latents), plain.decode(raw), atol=1e-5)


def test_frames_are_not_clipped():
    vae = tiny_vae()
    vae.decoder.head_conv.bias[...] = jnp.array([5.0, 0.0, -5.0])
    decoded = vae.decode(np.zeros((2, 1, 2, 3, 2), np.float32))
    assert decoded[..., 0].min() > 1
    assert decoded[..., 2].max() < -1


def test_bfloat16_on_trained_weights():
    """Close enough to decode in, as 8 bits a pixel are 59 dB; too coarse to encode in, as storing is 1.7e-3."""
    vae = load_vae(Path(__file__).parents[1] / "weights" / "tiny")
    half = computing_in(vae, jnp.bfloat16)
    assert {leaf.dtype for path, leaf in flat_state(nnx.state(half)).items() if path.endswith("kernel")} == {
        jnp.dtype(jnp.bfloat16)
    }
    video = shapes_world.clip(0, frames=5, height=32, width=32)[0][None]
    latents = vae.encode(video)
    assert 3e-3 < relative_error(half.encode(video), latents) < 4e-2
    decoded, rounded = vae.decode(latents), half.decode(latents)
    assert rounded.dtype == jnp.float32
    psnr = 10 * np.log10(4 / np.mean((np.clip(rounded, -1, 1) - np.clip(decoded, -1, 1)) ** 2))
    assert 50 < psnr < 70


def test_both_directions_can_be_differentiated():
    graph, state = abstract(TINY)

    def loss(state, video):
        vae = nnx.merge(graph, state)
        return jnp.mean((vae.decode(vae.encode(video)) - video) ** 2)

    gradients = jax.eval_shape(jax.grad(loss), state, jax.ShapeDtypeStruct((1, 5, 4, 6, 3), jnp.float32))
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, state)


@pytest.mark.parametrize(("direction", "channels"), [("_encode", 3), ("_decode", 2)])
def test_memory_and_program_do_not_grow_with_the_clip(direction, channels):
    def lowered(frames):
        clip = jax.ShapeDtypeStruct((1, frames, 32, 32, channels), jnp.float32)
        return getattr(wan_vae, direction).lower(*abstract(TINY), clip, None, 8.0)

    short, long = lowered(5), lowered(33)
    assert len(short.as_text().splitlines()) == len(long.as_text().splitlines())
    short, long = (program.compile().memory_analysis() for program in (short, long))
    ends = sum(
        getattr(long, name) - getattr(short, name) for name in ("argument_size_in_bytes", "output_size_in_bytes")
    )
    assert long.temp_size_in_bytes - short.temp_size_in_bytes <= 2 * ends  # re-laid copies of the clip, no activations


@pytest.mark.parametrize(("direction", "channels"), [("_encode", 3), ("_decode", 2)])
def test_every_product_names_its_precision(direction, channels):
    """Without a name, float32 is rounded to bfloat16 on a TPU."""
    clip = jax.ShapeDtypeStruct((1, 3, 4, 6, channels), jnp.float32)
    traced = getattr(wan_vae, direction).trace(*abstract(TINY), clip, None, 8.0)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    products = [line for line in text.splitlines() if re.search(r"stablehlo.(convolution|dot_general)\b", line)]
    assert len(products) > 10
    assert [line for line in products if "HIGH, HIGH" not in line.replace("#stablehlo<precision HIGH>", "HIGH")] == []


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 8, 8, 3), "video has 4 frames; give a multiple of 2 and one more"),
        ((1, 3, 7, 8, 3), "video height is 7; give a multiple of 2"),
        ((1, 3, 8, 9, 3), "video width is 9; give a multiple of 2"),
        ((1, 3, 8, 8, 4), "channels=3"),
        ((3, 8, 8, 3), "video has shape"),
        ((1, 0, 8, 8, 3), "none empty"),
    ],
    ids=str,
)
def test_clips_that_do_not_fit(tiny, shape, message):
    with pytest.raises(UserError, match=message):
        tiny.encode(jnp.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 1, 2, 2, 16), (1, 2, 2, 2), (1, 0, 2, 2, 2)], ids=str)
def test_latents_that_do_not_fit(tiny, shape):
    with pytest.raises(UserError, match=r"latents has shape .* z_dim=2"):
        tiny.decode(jnp.zeros(shape))


def test_bytes_are_no_video(tiny):
    with pytest.raises(UserError, match="video is uint8"):
        tiny.encode(np.zeros((1, 1, 4, 6, 3), np.uint8))


def test_config_of_the_wrong_length():
    with pytest.raises(UserError, match="latents_mean has 16 values; give 4"):
        WanVAEConfig(z_dim=4)
    with pytest.raises(UserError, match="temporal_downsample has 3 values; give 1"):
        WanVAEConfig(dim_mult=(1, 2))


def test_config_of_a_native_file():
    assert vae_rules.config_from_native(NATIVE_SHAPES) == CONFIG


@pytest.mark.parametrize("config", [WanVAEConfig(), TINY], ids=["wan", "tiny"])
def test_config_to_diffusers_and_back(config):
    entries = json.loads(json.dumps(vae_rules.config_to_diffusers(config)))
    assert vae_rules.config_from_diffusers(entries) == config


def test_config_of_diffusers():
    entries = vae_rules.config_to_diffusers(CONFIG)
    assert {key: value for key, value in entries.items() if key != "_diffusers_version"} == CONFIG_JSON
    # What diffusers wrote before it knew of other autoencoders.
    older = {key: CONFIG_JSON[key] for key in ("base_dim", "dim_mult", "temperal_downsample", "z_dim")}
    assert vae_rules.config_from_diffusers(older) == CONFIG


def without(key):
    return {name: shape for name, shape in NATIVE_SHAPES.items() if name != key}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (without("encoder.conv1.bias"), "'encoder.conv1.bias' is missing"),
        (without("encoder.downsamples.3.residual.6.bias"), "'encoder.downsamples.3.residual.6.bias' is missing"),
        (NATIVE_SHAPES | {"conv2.bias": (48,)}, "48 channels"),
        (NATIVE_SHAPES | {"encoder.downsamples.0.residual.6.bias": (5,)}, "widths"),
        ({"model.weight": (2, 3)}, "no Wan2.1 VAE"),
    ],
    ids=["first", "block", "latents", "widths", "other"],
)
def test_native_files_that_are_none(shapes, message):
    with pytest.raises(UserError, match=message) as error:
        vae_rules.config_from_native(shapes, name="folder/some.pth")
    assert str(error.value).startswith("folder/some.pth: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "_class_name is 'AutoencoderKL'"),
        ({"is_residual": True}, "is_residual is True"),
        ({"attn_scales": [0.5]}, "attn_scales"),
        ({"decoder_base_dim": 7}, "decoder_base_dim is 7"),
        ({"scale_factor_spatial": 16}, "scale_factor_spatial is 16; .* 8"),
        ({"z_dim": 8}, "latents_mean has 16 values"),
        ({"base_dimm": 8}, "'base_dimm' is not known .did you mean 'base_dim'"),
    ],
    ids=str,
)
def test_configs_of_other_autoencoders(change, message):
    with pytest.raises(UserError, match=message):
        vae_rules.config_from_diffusers(CONFIG_JSON | change)


def test_a_second_call_is_not_compiled(tiny):
    video = random_video(5)
    tiny.encode(video)
    programs = wan_vae._encode._cache_size()
    tiny.encode(video + 0.1)
    assert wan_vae._encode._cache_size() == programs
