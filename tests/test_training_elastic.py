"""Parameters and moments are really cut over the devices, and a state saved on some is restored on others."""

import dataclasses
import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import DIT, LATENTS_SHAPE, make_config, make_frozen, make_method, start_state

from avd_jax.models.functional import make_denoiser
from avd_jax.parallel.hosts import batch_rows
from avd_jax.parallel.mesh import make_mesh, replicated
from avd_jax.parallel.rules import LARGE_LEAF
from avd_jax.training.assembly import Assembly
from avd_jax.training.checkpoint import Checkpoints
from avd_jax.training.state import abstract_state

# Small, but for leaves of a million elements: the text's projection, and the feed-forward layers' stacks.
LARGE = dataclasses.replace(DIT, dim=256, ffn_dim=2048, text_dim=4096)


def touching_all(params, latents, timesteps, conditions):
    """Stands in for the transformer: small to compile, with a gradient for every parameter."""
    return latents * sum(jnp.mean(leaf) for leaf in jax.tree.leaves(params))


def method_on(mesh, sizes, config):
    params = make_denoiser(sizes, dtype="float32", param_dtype="float32", remat="none").abstract_params()
    return make_method(config, touching_all, touching_all, abstract=params, mesh=mesh)


def state_of(method):
    """A state whose parameters are all different, made where it belongs."""
    abstract = abstract_state(method)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    @partial(jax.jit, out_shardings=shardings)
    def make():
        leaves, tree = jax.tree.flatten(abstract.networks["generator"].params)
        values = [jnp.cos(i + jnp.arange(leaf.size, dtype=jnp.float32)) for i, leaf in enumerate(leaves)]
        params = [value.reshape(leaf.shape) for value, leaf in zip(values, leaves, strict=True)]
        return start_state(method, jax.tree.unflatten(tree, params))

    return make()


def large_leaves(state):
    return [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state) if leaf.size >= LARGE_LEAF]


@pytest.fixture(scope="module")
def updated():
    """A large state on eight devices after both updates, and the bytes that each program holds on a device."""
    mesh, config = make_mesh(data=1, fsdp=-1), make_config(ema_decay=0.9, batch_size=8)
    assembly = Assembly(method_on(mesh, LARGE, config))
    state, bytes_held = state_of(assembly.method), []
    small = jax.device_put({"a": np.ones(3, np.float32)}, replicated(mesh))
    frozen = make_frozen(small, np.zeros((8, 16), np.float32))
    put = batch_rows(mesh, 8).put
    batch = {
        "prompts": {"prompt_embeds": put(np.ones((8, 8, 16), np.float32))},
        "captions": {"prompt_embeds": put(np.ones((8, 8, 16), np.float32))},
        "latents": put(np.ones((8, *LATENTS_SHAPE), np.float32)),
        "canvas": put(np.ones((8, 0, *LATENTS_SHAPE), np.float32)),
    }
    assert [call.update.network for call in assembly.calls] == ["fake_score", "generator"]
    for call in assembly.calls:
        inputs = {name: batch[name] for name in call.fields}
        program = call.step.lower(state, frozen, inputs, jax.random.key(1)).compile()
        bytes_held.append(program.memory_analysis().argument_size_in_bytes)
        state, _ = program(state, frozen, inputs, jax.random.key(1))
    return state, bytes_held


def test_no_device_holds_a_large_leaf_whole(updated):
    state, _ = updated
    found = large_leaves(state)
    assert len({path[:3] for path, _ in found}) == 5, "networks, EMA and both optimizers"
    assert int(state.step) == 1
    for path, leaf in found:
        name, shards = jax.tree_util.keystr(path), leaf.addressable_shards
        assert len({str(shard.index) for shard in shards}) == 8, name
        assert all(shard.data.size * 8 == leaf.size for shard in shards), name


def test_a_program_holds_an_eighth_of_the_state(updated):
    state, bytes_held = updated
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert all(held < 1.1 * whole / 8 for held in bytes_held)


def test_moments_are_cut_like_their_parameters(updated):
    state, _ = updated
    for network in (state.networks["generator"], state.networks["fake_score"]):
        params, adam = network.params, network.optimizer[1][0]
        for moments in (adam.mu, adam.nu):
            assert jax.tree.map(lambda leaf: leaf.sharding, moments) == jax.tree.map(lambda leaf: leaf.sharding, params)
    assert any(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(adam.mu)), "an update was made"


@pytest.mark.parametrize(
    ("devices", "sizes"), [(4, {"data": 1, "fsdp": 4}), (8, {"data": 4, "fsdp": 2}), (1, {"data": 1, "fsdp": 1})]
)
def test_a_state_saved_on_eight_devices_is_restored_on_others(saved, devices, sizes):
    state, workdir, config = saved
    mesh = make_mesh(**sizes, devices=jax.devices()[:devices])
    abstract = abstract_state(method_on(mesh, DIT, config))
    restored = Checkpoints(workdir, keep=2).restore(1, abstract)
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(state), strict=True)
    kernel, wanted = (state.networks["generator"].params["blocks"]["ffn_0"]["kernel"] for state in (restored, abstract))
    assert kernel.sharding == wanted.sharding
    parts = math.prod(kernel.shape) // math.prod(kernel.addressable_shards[0].data.shape)
    assert parts == sizes["fsdp"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small state on eight devices, and the workdir that it is saved in."""
    config, workdir = make_config(ema_decay=0.9), tmp_path_factory.mktemp("run")
    state = state_of(method_on(make_mesh(data=1, fsdp=8), DIT, config))
    checkpoints = Checkpoints(workdir, keep=2)
    checkpoints.save(1, state, {}, {})
    checkpoints.wait()
    return state, workdir, config
