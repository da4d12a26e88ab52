"""Stacked layers: what half precision costs on a CPU, and that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.models.layers import scan_layers

LAYERS, WIDTH = 16, 64


def apply(x, layer):
    return jnp.tanh(x @ layer["kernel"].astype(jnp.float32)) + layer["bias"].astype(jnp.float32)


def layers(dtype):
    rng = np.random.default_rng(0)
    shapes = {"kernel": (LAYERS, WIDTH, WIDTH), "bias": (LAYERS, WIDTH)}
    # Values that bfloat16 holds exactly.
    return {
        name: jnp.asarray(rng.standard_normal(shape) / 8, jnp.bfloat16).astype(dtype) for name, shape in shapes.items()
    }


def run(stack, x):
    return scan_layers(apply, x, stack)


X = np.linspace(-1, 1, WIDTH, dtype=np.float32)[None]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_never_widened_for_all_layers(dtype):
    """The widened layers would be twice the parameters; one of them is an eighth."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), layers(jnp.float32))
    memory = jax.jit(run).lower(shapes, X).compile().memory_analysis()
    assert memory.temp_size_in_bytes < memory.argument_size_in_bytes / 2


def test_every_storage_gives_the_same_result_and_gradient():
    wide, narrow = layers(jnp.float32), layers(jnp.bfloat16)
    expected = X
    for i in range(LAYERS):
        expected = apply(expected, jax.tree.map(lambda leaf, i=i: leaf[i], wide))
    for stack in (wide, narrow):
        np.testing.assert_allclose(jax.jit(run)(stack, X), expected, rtol=1e-5, atol=1e-6)

    def slope(stack):
        return jax.grad(lambda stack: jnp.sum(run(stack, X) ** 2))(stack)["kernel"].astype(jnp.float32)

    np.testing.assert_allclose(slope(narrow), slope(wide), rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize(("platform", "branches"), [("cpu", True), ("tpu", False), ("cuda", False)])
def test_only_a_cpu_gets_a_branch_in_the_loop(platform, branches):
    """On others it would keep the compiler from fetching the next layer ahead."""
    program = jax.jit(run).trace(layers(jnp.bfloat16), X).lower(lowering_platforms=(platform,)).as_text()
    _, loop = program.split("stablehlo.while")
    assert ("stablehlo.case" in loop) == branches
