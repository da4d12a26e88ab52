"""RAFT against its authors' form in PyTorch (golden file by make_raft_fixture.py), and by known answers."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pth_cases import write_pth

from avd_jax import convert
from avd_jax.errors import UserError
from avd_jax.models import raft
from avd_jax.models.raft import RAFT, RAFTConfig

GOLDEN = dict(np.load(Path(__file__).parent / "fixtures" / "raft_golden.npz"))
WEIGHTS = {key: value for key, value in GOLDEN.items() if key.startswith("module.")}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return convert.load_raft(write_pth(tmp_path_factory.mktemp("raft") / "raft-things.pth", WEIGHTS))


def test_the_flow_is_that_of_its_authors(model):
    flow = jax.jit(lambda *pair: model(*pair))(*(GOLDEN[name][None].astype(np.float32) for name in ("first", "second")))
    error = np.abs(np.asarray(flow[0, ::5, ::3]) - GOLDEN["flow"]).max() / np.sqrt(np.mean(GOLDEN["flow"] ** 2))
    assert error < 1e-4


def test_correlations_are_read_between_pixels_and_are_0_beyond_the_edge(model):
    """Of a ramp x + 10 y at a place between pixels, at the corner; the second level is the mean of 2 x 2."""
    ramp = jnp.arange(16.0) + 10 * jnp.arange(16.0)[:, None]
    pyramid = [ramp[None, None, None], (ramp[None, None, None, ::2, ::2] + 5.5)]
    found = model._around(pyramid, jnp.array([[[[2.25, 1.5]]]])).reshape(2, 5, 5)
    for dx in range(-2, 3):
        for dy in range(-1, 3):  # two above is row -0.5, of which half is beyond
            assert found[0, dx + 2, dy + 2] == pytest.approx(2.25 + dx + 10 * (1.5 + dy))
    assert found[0, 2, 0] == pytest.approx(2.25 / 2)
    assert found[1, 2, 2] == pytest.approx(2 * 1.125 + 20 * 0.75 + 5.5)
    assert np.all(np.asarray(model._around(pyramid, jnp.full((1, 1, 1, 2), -30.0))) == 0)


def test_the_flow_is_enlarged_by_what_the_mask_weighs():
    flow = jnp.arange(12.0).reshape(1, 2, 3, 2)
    only = jnp.zeros((1, 2, 3, 9, 64)).at[..., 4, :].set(100).reshape(1, 2, 3, 576)  # the middle of the nine
    np.testing.assert_allclose(raft._enlarged(flow, only), 8 * flow.repeat(8, 1).repeat(8, 2), rtol=1e-6)
    left = jnp.zeros((1, 2, 3, 9, 64)).at[..., 3, :].set(100).reshape(1, 2, 3, 576)
    np.testing.assert_allclose(raft._enlarged(flow, left)[0, 0, 8], 8 * flow[0, 0, 0], rtol=1e-6)
    assert np.all(np.asarray(raft._enlarged(flow, left)[0, :, 0]) == 0), "beyond the edge"


def test_padding_continues_the_edges():
    padded = raft.padded(np.arange(3.0)[None, :, None, None] * np.ones((1, 3, 129, 3)))
    assert padded.shape == (1, 8, 136, 3)
    np.testing.assert_array_equal(padded[0, :, 0, 0], [0, 0, 0, 1, 2, 2, 2, 2])


def test_full_size():
    abstract = nnx.eval_shape(lambda: RAFT(RAFTConfig(), nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(abstract, nnx.Param))) == 5_257_536


@pytest.mark.parametrize("size", [(120, 128), (128, 132)])
def test_pictures_of_another_size(model, size):
    with pytest.raises(ValueError, match="RAFT takes multiples of 8 from 128 on"):
        model(jnp.zeros((1, *size, 3)), jnp.zeros((1, *size, 3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keys: keys | {"module.fnet.layer1.0.conv3.weight": np.ones((4, 4, 1, 1), np.float32)}, "small model"),
        (
            lambda keys: {k: v for k, v in keys.items() if "convz1.weight" not in k},
            "no 'update_block.gru.convz1.weight'",
        ),
        (
            lambda keys: {k: v for k, v in keys.items() if "running_var" not in k},
            "missing: cnet.layer1.0.norm1.running_var",
        ),
        (lambda keys: keys | {"module.cnet.norm9.weight": np.ones(3, np.float32)}, "not known: cnet.norm9.weight"),
        (lambda keys: {"visual.class_embedding": np.ones(3, np.float32)}, "not known|RAFT"),
    ],
)
def test_other_weights(change, message, tmp_path):
    path = write_pth(tmp_path / "raft-things.pth", change(WEIGHTS))
    with pytest.raises(UserError, match=message) as error:
        convert.load_raft(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_weights_of_another_network(tmp_path):
    with pytest.raises(UserError, match="holds a CLIP, not a RAFT"):
        convert.load_raft(Path(__file__).parent / "fixtures" / "clip_script.pt")
    path = write_pth(tmp_path / "raft-things.pth", WEIGHTS)
    with pytest.raises(UserError, match="holds a RAFT, not CLIP's or DINO's"):
        convert.load_vit(path)
    with pytest.raises(UserError, match=r"no such file; give raft-things\.pth itself"):
        convert.load_raft(tmp_path)
