"""The vision transformers against transformers and DINO's own form (golden file by make_vit_fixture.py)."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from avd_jax.convert import engine, vit_rules
from avd_jax.convert.state import flat_state, from_flat
from avd_jax.models import vit_images
from avd_jax.models.resampling import resampled, taps
from avd_jax.models.vit import CLIP_B_32, CLIP_L_14, DINO_B_16, VisionTransformer

GOLDEN = np.load(Path(__file__).parent / "fixtures" / "vit_golden.npz")


def weights(name):
    prefix = f"{name}/"
    return {key.removeprefix(prefix): GOLDEN[key] for key in GOLDEN if key.startswith(prefix)}


def model_with(tensors, config, rules, dtype=jnp.float32):
    abstract = nnx.eval_shape(lambda: VisionTransformer(config, nnx.Rngs(0), dtype=dtype, param_dtype=dtype))
    graph, state = nnx.split(abstract)
    leaves = flat_state(state)
    pieces = engine.resolve(rules, {key: value.shape for key, value in tensors.items()}, leaves, name="test")
    arrays = dict(engine.leaves_from_torch(pieces, leaves, lambda key, rows: tensors[key]))
    return nnx.merge(graph, from_flat(state, {path: jnp.asarray(array) for path, array in arrays.items()}))


def clip(dtype=jnp.float32):
    config = vit_rules.clip_config_from_json(json.loads(str(GOLDEN["clip_config"])), name="test")
    return model_with(weights("clip"), config, vit_rules.clip_huggingface_rules(config), dtype)


def dino():
    tensors = weights("dino")
    config = vit_rules.config_from_shapes({key: value.shape for key, value in tensors.items()}, name="test")
    return model_with(tensors, config, vit_rules.dino_native_rules(config))


@jax.jit
def apply(model, images):
    return nnx.merge(*model)(images)


def features_of(model, images):
    return apply(nnx.split(model), images)


def relative_error(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() / np.sqrt(np.mean(theirs**2))


def test_clip_is_that_of_transformers():
    features = features_of(clip(), GOLDEN["clip_images"])
    assert features.dtype == jnp.float32
    assert relative_error(features, GOLDEN["clip_features"]) < 2e-5


@pytest.mark.parametrize("images", ["dino_square", "dino_wide"])
def test_dino_is_that_of_its_authors(images):
    assert relative_error(features_of(dino(), GOLDEN[images]), GOLDEN[f"{images}_features"]) < 2e-5


def test_bfloat16_is_near_float32():
    features = features_of(clip(jnp.bfloat16), GOLDEN["clip_images"])
    assert features.dtype == jnp.float32
    assert 1e-4 < relative_error(features, GOLDEN["clip_features"]) < 0.05


def test_clip_refuses_images_of_another_size():
    with pytest.raises(ValueError, match="3 x 3 patches was given 4 x 3"):
        clip()(jnp.zeros((1, 32, 24, 3)))


@pytest.mark.parametrize(
    ("config", "count"), [(CLIP_L_14, 303_966_208), (CLIP_B_32, 87_849_216), (DINO_B_16, 85_798_656)], ids=str
)
def test_full_sizes(config, count):
    def features(images):
        return VisionTransformer(config, nnx.Rngs(0))(images)

    abstract = nnx.eval_shape(lambda: VisionTransformer(config, nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(abstract))) == count
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    assert jax.eval_shape(features, images).shape == (2, config.feature_dim)


def test_preprocessing_is_that_of_transformers():
    ours = vit_images.Preprocessing(vit_images.CLIP_MEAN, vit_images.CLIP_STD, shorter_side=24, crop=24)
    np.testing.assert_allclose(ours(GOLDEN["picture"][None]), GOLDEN["preprocessed"], atol=1e-6)


def test_preprocessing_for_vbench():
    frames = np.full((2, 360, 640, 3), 51, np.uint8)
    assert vit_images.VBENCH_DINO(frames).shape == (2, 224, 398, 3)
    pixels = vit_images.VBENCH_CLIP(frames)
    assert pixels.shape == (2, 224, 224, 3)
    expected = (0.2 - np.array(vit_images.CLIP_MEAN)) / np.array(vit_images.CLIP_STD)
    np.testing.assert_allclose(pixels, np.broadcast_to(expected, pixels.shape), rtol=1e-5)


def test_the_centre_is_cut_out_as_torchvision_does():
    frames = np.arange(5 * 8).reshape(1, 5, 8, 1)
    np.testing.assert_array_equal(vit_images.centre(frames, 2)[0, :, :, 0], [[19, 20], [27, 28]])
    assert vit_images.centre(frames, None) is frames


@pytest.mark.parametrize("size", [4, 9, 30])
def test_resampling_keeps_what_is_constant_and_if_linear_straight_lines(size):
    for cubic in (False, True):
        constant = resampled(np.full((3, 12), 7.0), 1, *taps(12, size, cubic=cubic))
        np.testing.assert_allclose(constant, np.full((3, size), 7.0), rtol=1e-6)
    places = (np.arange(size) + 0.5) * 12 / size - 0.5
    line = resampled(np.arange(12.0), 0, *taps(12, size, cubic=False))
    np.testing.assert_allclose(line, np.clip(places, 0, 11), atol=1e-5)  # beyond the edge is the value at the edge


def test_resampling_by_its_formula():
    """Half-way between two of four values: weights (-3, 19, 19, -3) / 32 with PyTorch's coefficient of -3/4."""
    indices, found = taps(4, 2)
    np.testing.assert_array_equal(indices, [[0, 0, 1, 2], [1, 2, 3, 3]])
    np.testing.assert_allclose(found, np.broadcast_to(np.array([-3, 19, 19, -3]) / 32, (2, 4)), rtol=1e-6)
