"""A transformer whose layers wait in the host's memory: where its parameters are, and that it computes the same."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from training_cases import DIT, LATENTS_SHAPE, make_batch, write_weights

from avd_jax import convert
from avd_jax.errors import UserError
from avd_jax.models.functional import make_denoiser
from avd_jax.parallel.memory import fitting, parameter_sharding
from avd_jax.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("dit"))


def load(weights, memory):
    mesh = make_mesh(fsdp=4, data=2)
    return convert.load_dit(weights, dtype=jnp.float32, sharding=partial(parameter_sharding, mesh=mesh, memory=memory))


@pytest.mark.parametrize("memory", ["device", "host"])
def test_layers_wait_where_they_are_told_to(weights, memory):
    kinds = {"layers": set(), "rest": set()}
    for path, leaf in nnx.to_flat_state(nnx.state(load(weights, memory))):
        kinds["layers" if (path[0], path[-1]) == ("blocks", "kernel") else "rest"].add(leaf[...].sharding.memory_kind)
    assert kinds == {"layers": {"device" if memory == "device" else "pinned_host"}, "rest": {"device"}}


def test_what_waits_on_the_host_computes_the_same_and_takes_no_device_memory(weights):
    network = make_denoiser(DIT, dtype="float32", param_dtype="float32", remat="none")
    batch, times = make_batch(2, shape=LATENTS_SHAPE), jnp.array([900.0, 100.0])
    results, on_device = {}, {}
    for memory in ("device", "host"):
        params = nnx.to_pure_dict(nnx.state(load(weights, memory)))
        inputs = params, batch["latents"], times, batch["captions"]
        results[memory] = np.asarray(jax.jit(lambda *inputs: network(*inputs))(*inputs))
        on_device[memory] = sum(
            leaf.nbytes for leaf in jax.tree.leaves(params) if leaf.sharding.memory_kind == "device"
        )
    np.testing.assert_allclose(results["host"], results["device"], atol=1e-6)
    assert on_device["host"] < 0.5 * on_device["device"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: x\ny"), "it: does not fit into the memory of 1 x cpu; less"),
        (MemoryError(), "it: does not fit into the memory of 1 x cpu; less"),
        (
            jax.errors.JaxRuntimeError("INTERNAL: a\nb"),
            "it: failed on 1 x cpu (INTERNAL: a b), likely for want of memory; less",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(error, message):
    for mesh in (None, make_mesh(devices=jax.devices()[:1])):
        with pytest.raises(UserError) as raised, fitting("it", "less", mesh):
            raise error
        assert str(raised.value) == message
    with pytest.raises(KeyError), fitting("it", "less"):
        raise KeyError
