"""The frame interpolator: PyTorch's golden output, kept frames, any size, sizes of the published widths, errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_cases import FIXTURES, write_all
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from avd_jax import convert
from avd_jax.errors import UserError
from avd_jax.models.interpolator import Interpolator, InterpolatorConfig
from avd_jax.parallel.mesh import AXES
from avd_jax.parallel.rules import spec_for

GOLDEN = FIXTURES / "interpolator_golden.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def unet(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_all(folder, {key: array for key, array in golden.items() if key.startswith("model.")})
    return convert.load_interpolator(folder / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def apply():
    return nnx.jit(lambda unet, latents: unet(latents))


def test_golden_output_of_pytorch(golden, unet, apply):
    expected = golden["interpolated"]
    actual = apply(unet, golden["latents"])
    assert np.abs(actual - expected).max() <= 1e-5 * np.sqrt(np.mean(np.square(expected)))


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_the_given_frames_are_kept_exactly_and_each_pair_alone_decides_the_one_between(unet, apply, frames):
    latents = np.random.default_rng(0).standard_normal((2, frames, 8, 4, 4)).astype(np.float32)
    longer = apply(unet, latents)
    assert longer.shape == (2, 2 * frames - 1, 8, 4, 4)
    np.testing.assert_array_equal(longer[:, ::2], latents)
    for i in range(frames - 1):
        pair = apply(unet, latents[1:, i : i + 2])
        np.testing.assert_allclose(longer[1:, 2 * i + 1], pair[:, 1], atol=1e-5)


@pytest.mark.parametrize("size", [(5, 7), (2, 3), (15, 26)])
def test_a_size_that_pooling_does_not_divide_continues_at_the_edge(unet, apply, size):
    height, width = size
    latents = np.random.default_rng(1).standard_normal((1, 2, height, width, 4)).astype(np.float32)
    grown = np.pad(latents, ((0, 0), (0, 0), (0, -height % 4), (0, -width % 4), (0, 0)), mode="edge")
    np.testing.assert_allclose(apply(unet, latents), apply(unet, grown)[:, :, :height, :width], atol=1e-5)


def test_statistics_get_no_gradient(unet):
    graphdef, state = nnx.split(unet)
    latents = jnp.ones((1, 2, 4, 4, 4))
    gradient = jax.grad(lambda state: jnp.sum(nnx.merge(graphdef, state)(latents) ** 2))(state)
    statistics = nnx.filter_state(gradient, nnx.BatchStat)
    assert len(jax.tree.leaves(statistics)) == 10
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(statistics))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(nnx.filter_state(gradient, nnx.Param)))


@pytest.mark.parametrize(
    ("widths", "parameters"),
    # By hand: 9 i o and 2 o a block, 4 i o + o a transposed convolution, i o + o the last one.
    [((32, 64, 128), 235_760), ((512, 1024, 2048), 57_839_120)],
)
def test_published_sizes(widths, parameters):
    unet = nnx.eval_shape(lambda: Interpolator(InterpolatorConfig(widths=widths), nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(unet, nnx.Param))) == parameters
    first, second, third = widths
    blocks = ((32, first), (first, second), (second, third), (2 * second, second), (2 * first, first))
    by_hand = sum(9 * i * o + 2 * o for i, o in blocks)
    by_hand += sum(4 * i * o + o for i, o in ((third, second), (second, first))) + first * 16 + 16
    assert by_hand == parameters


def test_bad_input(unet):
    with pytest.raises(UserError, match="the latents have 16 channels, the interpolator takes 4"):
        unet(np.zeros((1, 2, 4, 4, 16), np.float32))
    for sizes, message in (
        ({"widths": (8, 16)}, "widths=(8, 16) and channels=16 must be three and one positive whole numbers"),
        ({"channels": 0}, "widths=(32, 64, 128) and channels=0 must be"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            InterpolatorConfig(**sizes)


def test_the_wide_kernels_are_sharded_and_the_mesh_divides_them():
    unet = nnx.eval_shape(lambda: Interpolator(InterpolatorConfig(widths=(512, 1024, 2048)), nnx.Rngs(0)))
    mesh = AbstractMesh((1, 64, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    for path, leaf in convert.flat_state(nnx.state(unet)).items():
        spec = spec_for(f"generator.{path}", leaf.shape, mesh)
        assert (spec[-1:] == (("fsdp", "seq"),)) == (leaf.ndim == 4), path
