"""Weights in 8 bits: how far they are from what was rounded, that a network computes with them, what is refused."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation_cases import InMemory
from jax.sharding import SingleDeviceSharding
from training_cases import DIT

from avd_jax.convert.architectures import WAN_DIT
from avd_jax.convert.state import flat_state
from avd_jax.convert.weights import load_module
from avd_jax.errors import UserError
from avd_jax.generation.low_bit import load_low_bit
from avd_jax.generation.settings import Settings
from avd_jax.models import low_bit
from avd_jax.models.functional import denoiser


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.5 / 127), ("fp8", 0.5 * 32 / 448)])
def test_a_kernel_is_rounded_output_by_output(kind, bound):
    kernel = np.random.default_rng(0).standard_normal((2, 6, 4, 5)).astype(np.float32)
    kernel[:, :, 1, 2] *= 1000  # one output is much larger than the others, and one is nothing
    kernel[0, :, 3, 4] = 0
    values, scale = low_bit.rounded(kernel, 1, kind)
    assert values.dtype == low_bit.KINDS[kind][0]
    assert values.shape == (2, 20, 6)
    assert scale.shape == (2, 4, 5)
    back = values.astype(np.float32).swapaxes(1, 2).reshape(kernel.shape) * scale[:, None]
    largest = np.abs(kernel).max(axis=1, keepdims=True)
    assert np.all(np.abs(back - kernel) <= bound * largest * (1 + 1e-6))
    assert np.all(np.abs(back).max(axis=1) == pytest.approx(largest[:, 0], rel=1e-6))
    if kind == "fp8":  # eight steps from one power of two to the next
        normal = np.abs(kernel) > largest * 2**-6 / 448
        assert np.all(np.abs(back - kernel)[normal] <= np.abs(kernel)[normal] / 16 * (1 + 1e-6))


def test_a_network_computes_with_what_is_left_of_its_weights():
    weights = InMemory(WAN_DIT, DIT)
    whole = SingleDeviceSharding(jax.devices()[0])
    exact = load_module(weights, jnp.float32)
    rng = np.random.default_rng(0)
    latents, text = rng.standard_normal((1, 3, 4, 4, 4)), rng.standard_normal((1, 8, 16))
    inputs = (
        *(jnp.asarray(x, jnp.float32) for x in (latents, [700.0])),
        {"prompt_embeds": jnp.asarray(text, jnp.float32)},
    )
    plain, params = denoiser(exact)
    plain = jax.jit(plain)
    velocity = plain(params, *inputs)
    errors = {}
    for kind in low_bit.KINDS:
        network, held = denoiser(load_low_bit(weights, jnp.float32, kind, lambda path, shape: whole))
        flat, back = flat_state(held), dict(flat_state(params))
        kernels = [path for path in back if path.startswith("blocks.") and path.endswith(".kernel")]
        assert len(kernels) == 10
        for path in kernels:
            values, scale = (flat[path.replace("kernel", name)] for name in ("values", "scale"))
            assert values.dtype == low_bit.KINDS[kind][0]
            values = values.swapaxes(1, 2) if path.endswith((".q.kernel", ".k.kernel", ".v.kernel")) else values
            wide = values.astype(jnp.float32) * scale.reshape(scale.shape[0], 1, -1)
            back[path] = wide.reshape(back[path].shape)
        assert all(np.array_equal(flat[path], back[path]) for path in back if path not in kernels)
        leaves, structure = jax.tree_util.tree_flatten_with_path(params)
        order = [".".join(key.key for key in keys) for keys, _ in leaves]
        expected = plain(jax.tree.unflatten(structure, [back[path] for path in order]), *inputs)
        found = jax.jit(network)(held, *inputs)
        np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))
        errors[kind] = float(jnp.linalg.norm(found - velocity) / jnp.linalg.norm(velocity))
    assert 0 < errors["int8"] < errors["fp8"] < 0.2
    assert errors["int8"] < 0.02


def test_in_bfloat16_nothing_becomes_wider_for_the_scales():
    network, params = denoiser(low_bit.low_bit(lambda: WAN_DIT.build(DIT, jnp.bfloat16), "int8")[0])
    assert params["blocks"]["self_attn"]["q"]["values"].dtype == jnp.int8
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 3, 4, 4, 4), (1,), (1, 8, 16))]
    run = jax.make_jaxpr(lambda p, x, t, c: network(p, x, t, {"prompt_embeds": c}))(params, *inputs)
    products = [line for line in str(run).splitlines() if "dot_general" in line]
    assert any("bf16[1,12,40] = dot_general" in line for line in products)
    assert not any("f32[1,12,40] = dot_general" in line for line in products)


def device(kind, platform, capability=None):
    return SimpleNamespace(device_kind=kind, platform=platform, compute_capability=capability)


@pytest.mark.parametrize(
    "one", [device("TPU v5 lite", "tpu"), device("TPU v6 lite", "tpu"), device("NVIDIA A100", "gpu", "8.0")]
)
def test_devices_without_fp8_are_refused(one):
    with pytest.raises(UserError, match=rf"--weights_dtype fp8: {one.device_kind} has no such numbers; take int8"):
        low_bit.check_device("fp8", one)
    low_bit.check_device("int8", one)


def test_devices_with_fp8():
    for one in (
        device("NVIDIA H100", "gpu", "9.0"),
        device("NVIDIA L4", "gpu", "8.9"),
        device("TPU7x", "tpu"),
        device("", "cpu"),
    ):
        low_bit.check_device("fp8", one)


def test_it_decides_a_video_and_leaves_other_names_alone():
    settings = Settings(
        **{"weights": "w", "checkpoint": None, "which": "generator", "solver": "student", "steps": 1, "fps": 16.0},
        **{"timesteps": (1000.0,), "shift": None, "guidance_scale": None, "negative_prompt": None, "frames": 5},
        **{"height": 16, "width": 16, "dtype": "float32"},
    )
    assert settings.digest({"vae": "1"}) == "a62a5690"
    digests = {replace(settings, weights_dtype=kind).digest({}) for kind in (None, *low_bit.KINDS)}
    assert len(digests) == 3
    with pytest.raises(UserError, match=r"--weights_dtype int4: give one of int8, fp8, or leave it out"):
        replace(settings, weights_dtype="int4")
