"""What methods read of the transformer that a config names: its weights with the adapters merged in."""

import convert_cases as cases
import jax
import numpy as np
import pytest
from ml_collections import config_dict

from avd_jax import methods
from avd_jax.convert.state import flat_state
from avd_jax.methods import transformers
from avd_jax.parallel.mesh import make_mesh


def test_adapters_are_part_of_the_weights_and_of_what_identifies_them(tmp_path):
    rng = np.random.default_rng(0)
    pair = {"A": rng.standard_normal((2, 24)).astype(np.float32), "B": rng.standard_normal((24, 2)).astype(np.float32)}
    tensors = {f"transformer.blocks.1.attn2.to_v.lora_{end}.weight": array for end, array in pair.items()}
    cases.write_all(tmp_path, tensors, stem="style")
    config = config_dict.ConfigDict({"init_from": str(cases.NATIVE), "which": "", "init_lora": ""})
    mesh = make_mesh(devices=jax.devices()[:1])
    plain, fingerprints = transformers.load_params(config, "float32", mesh), transformers.weights_fingerprints(config)
    assert fingerprints.keys() == {"init_from"}
    config.init_lora = f"{tmp_path}/style.safetensors:0.5"
    merged = flat_state(transformers.load_params(config, "float32", mesh))
    found = transformers.weights_fingerprints(config)
    assert found.items() > fingerprints.items()
    config.init_lora = f"{tmp_path}/style.safetensors:0.25"
    assert transformers.weights_fingerprints(config)["init_lora"] != found["init_lora"]
    for path, array in flat_state(plain).items():
        change = merged[path] - array
        if path == "blocks.cross_attn.v.kernel":
            expected = 0.5 * (pair["B"] @ pair["A"]).T.reshape(24, 2, 12)
            np.testing.assert_allclose(change[1], expected, rtol=1e-4, atol=1e-5)
            change = change[0]
        np.testing.assert_array_equal(change, 0, err_msg=path)


@pytest.mark.parametrize("name", ["avd", "rcm", "flow_matching"])
def test_every_method_of_a_transformer_takes_them(name):
    field = methods.get(name).fields["init_lora"]
    assert field.check("a.safetensors:0.8,b.safetensors") is None
    assert "the strength 'much' is no number" in field.check("a.safetensors:much")
