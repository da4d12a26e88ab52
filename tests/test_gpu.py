"""What only an NVIDIA GPU shows, skipped elsewhere: JAX_PLATFORMS=cuda python -m pytest tests/test_gpu.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.models.attention import attention
from avd_jax.models.placement import Placement
from avd_jax.parallel.compiler import OPTIONS

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU")


def values_and_gradients(kernel, dtype, *arrays, valid_keys):
    def loss(query, key, value):
        output = attention(query, key, value, placement=Placement(kernel=kernel), valid_keys=valid_keys)
        return jnp.sum(output.astype(jnp.float32) * weights), output

    weights = jax.random.normal(jax.random.key(9), arrays[0].shape)
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), compiler_options=OPTIONS["gpu"])
    (_, output), gradients = run(*(x.astype(dtype) for x in arrays))
    return [np.asarray(x, np.float32) for x in (output, *gradients)]


def heads(queries, keys, head_dim=128):
    shapes = (2, 3, queries, head_dim), (2, 3, keys, head_dim), (2, 3, keys, head_dim)
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def error(found, exact):
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize(
    ("queries", "keys", "valid"), [(256, 256, 256), (4095, 4095, 4095), (1000, 512, 77), (1001, 512, 512), (64, 64, 63)]
)
def test_cudnn_gives_xlas_values_and_gradients(queries, keys, valid):
    arrays = heads(queries, keys)
    exact = values_and_gradients("xla", jnp.float32, *arrays, valid_keys=valid)
    found = values_and_gradients("cudnn", jnp.bfloat16, *arrays, valid_keys=valid)
    for name, one, other in zip(("output", "query", "key", "value"), found, exact, strict=True):
        assert error(one, other) < 1e-2, name
    assert not found[2][:, :, valid:].any()


def test_cudnn_gives_the_same_output_every_time_and_gradients_up_to_rounding():
    """Its backward pass adds up the gradients of the queries in any order."""
    arrays = heads(8190, 8190)
    output, *gradients = values_and_gradients("cudnn", jnp.bfloat16, *arrays, valid_keys=8190)
    for _ in range(3):
        again, *others = values_and_gradients("cudnn", jnp.bfloat16, *arrays, valid_keys=8190)
        np.testing.assert_array_equal(again, output)
        assert max(map(error, others, gradients)) < 5e-3
