"""The aesthetic heads: one linear map each, and what is none."""

import convert_cases as cases
import numpy as np
import pytest
from pth_cases import write_pth

from avd_jax.convert.aesthetic_head import LINEAR, MLP, load_aesthetic_head
from avd_jax.convert.files import NotHereError
from avd_jax.errors import UserError

WIDTHS = {0: (10, 12), 2: (8, 10), 4: (6, 8), 6: (4, 6), 7: (1, 4)}  # of the layers between which there is dropout


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def mlp():
    layers = {f"layers.{i}.weight": normal(*shape) for i, shape in WIDTHS.items()}
    return layers | {f"layers.{i}.bias": normal(rows) for i, (rows, _) in WIDTHS.items()}


def test_the_linear_head(tmp_path):
    head = load_aesthetic_head(write_pth(tmp_path / "sa_0_4.pth", {"weight": normal(1, 768), "bias": normal(1)}))
    assert (head.name, head.file) == (LINEAR, "sa_0_4.pth")
    np.testing.assert_array_equal(head.weight, normal(1, 768)[0])
    assert head.bias == normal(1)[0]


def test_the_mlp_is_one_linear_map(tmp_path):
    layers = mlp()
    cases.write_all(tmp_path, layers, stem="model")
    x = normal(12)
    expected = x
    for i in WIDTHS:
        expected = layers[f"layers.{i}.weight"] @ expected + layers[f"layers.{i}.bias"]
    for path in (tmp_path, tmp_path / "model.safetensors", write_pth(tmp_path / "linearMSE.pth", layers)):
        head = load_aesthetic_head(path)
        assert (head.name, head.weight.dtype) == (MLP, np.float32)
        np.testing.assert_allclose(head.weight @ x + head.bias, expected[0], rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layers.4.weight": normal(6, 9)}, UserError, r"do not fit together at layers\.2\.weight"),
        ({"layers.7.weight": normal(2, 4)}, UserError, r"do not fit together at layers\.7\.weight"),
        ({"layers.9.weight": normal(1, 1), "layers.9.bias": normal(1)}, UserError, "there are activations between"),
        ({"layers.8.weight": normal(1, 1)}, NotHereError, "no aesthetic head"),
        ({"other": normal(1)}, NotHereError, "no aesthetic head"),
        ({"layers.0.weight": normal(3)}, NotHereError, "no aesthetic head"),
    ],
)
def test_what_is_no_head(change, error, message, tmp_path):
    path = write_pth(tmp_path / "head.pth", mlp() | change)
    with pytest.raises(error, match=message) as raised:
        load_aesthetic_head(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_aesthetic_head(tmp_path / "gone.pth")
    with pytest.raises(NotHereError, match=r"no model\.safetensors"):
        load_aesthetic_head(tmp_path)
