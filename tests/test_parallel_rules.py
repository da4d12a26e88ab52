"""Sharding rules: they cover every leaf of the full-size state, moments and EMA too, and shard all that is large."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from training_cases import make_config, make_method, start_state

from avd_jax.convert import flat_state
from avd_jax.errors import UserError
from avd_jax.models.adapters import Adapters, joined
from avd_jax.models.functional import make_denoiser
from avd_jax.models.interpolator import Interpolator, InterpolatorConfig
from avd_jax.models.linear import Projection
from avd_jax.models.wan_dit import WAN_1_3B, WAN_14B, WanDiT
from avd_jax.parallel.mesh import AXES, PARAMETER_AXES
from avd_jax.parallel.rules import (
    LARGE_LEAF,
    RULES,
    cut_axis,
    dotted,
    sharding_table,
    shardings,
    spec_for,
    tree_shardings,
)

W = PARAMETER_AXES


def mesh(*, fsdp, data=1, seq=1):
    return AbstractMesh((data, fsdp, seq), AXES, axis_types=(AxisType.Auto,) * 3)


@functools.cache
def state(config, rank=0):
    """The shapes of the whole training state of a model, or of adapters over it."""
    adapters = Adapters(rank, 1.0) if rank else None
    network = make_denoiser(config, dtype="bfloat16", param_dtype="float32", remat="none", adapters=adapters)
    abstract = jax.eval_shape(lambda: network.new_adapters(0)) if rank else network.abstract_params()
    method = make_method(make_config(ema_decay=0.99), abstract=abstract)
    return jax.eval_shape(lambda params: start_state(method, params), abstract)


@pytest.mark.parametrize(
    ("config", "rank", "fsdp", "seq"),
    [(WAN_1_3B, 0, 8, 1), (WAN_1_3B, 0, 16, 4), (WAN_14B, 0, 16, 8), (WAN_1_3B, 64, 16, 4), (WAN_14B, 64, 8, 2)],
)
def test_everything_large_is_cut_into_as_many_parts_as_there_are_devices(config, rank, fsdp, seq):
    tree, shards = state(config, rank), fsdp * seq
    specs = tree_shardings(tree, mesh(fsdp=fsdp, seq=seq))
    seen, per_device, whole = set(), 0, 0
    for (keys, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(specs), strict=True):
        local = sharding.shard_shape(leaf.shape)
        size = functools.reduce(lambda a, b: a * b, local, 1)
        per_device, whole = per_device + size, whole + leaf.size
        if leaf.size >= 2 * LARGE_LEAF:
            assert size * shards == leaf.size, f"{dotted(keys)} {leaf.shape} is held whole"
            seen.add(dotted(keys[:3]))
    parts = {"generator": ("params", "optimizer", "ema"), "fake_score": ("params", "optimizer")}
    assert seen == {f"networks.{network}.{part}" for network, names in parts.items() for part in names}
    assert per_device < 1.1 * whole / shards


def test_moments_and_ema_follow_their_parameters():
    specs = {
        dotted(keys): sharding.spec
        for keys, sharding in jax.tree_util.tree_leaves_with_path(tree_shardings(state(WAN_1_3B), mesh(fsdp=4)))
    }
    for path, spec in specs.items():
        if path.startswith("networks.generator.params."):
            name = path.removeprefix("networks.generator.params.")
            copies = [spec for other, spec in specs.items() if other.endswith(f".{name}")]
            assert len(copies) == 7, "two networks with two moments each, and the EMA"
            assert copies == [spec] * 7, path


def test_the_layer_axis_stays_whole():
    assert spec_for("blocks.self_attn.q.kernel", (30, 1536, 12, 128), mesh(fsdp=4)) == P(None, W, None, None)
    assert spec_for("blocks.ffn_2.kernel", (30, 8960, 1536), mesh(fsdp=4)) == P(None, None, W)
    assert spec_for("networks.generator.optimizer.1.0.mu.head.head.kernel", (1536, 64), mesh(fsdp=4)) == P(W, None)


def test_every_rule_is_used():
    params = joined(state(WAN_1_3B, 64).networks["generator"].params, state(WAN_1_3B).networks["generator"].params)
    paths = [f".{dotted(keys)}" for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
    paths.append(".blocks.ffn_0.values")
    interpolator = nnx.eval_shape(lambda: Interpolator(InterpolatorConfig(), nnx.Rngs(0)))
    paths += [f".{path}" for path in flat_state(nnx.state(interpolator))]
    for pattern, _ in RULES:
        assert any(re.search(pattern, path) for path in paths), pattern


def test_what_is_small_stays_whole_if_the_mesh_does_not_divide_it():
    assert spec_for("blocks.ffn_0.kernel", (2, 24, 40), mesh(fsdp=7)) == P()
    assert spec_for("step", (), mesh(fsdp=7)) == P()


def test_what_is_large_must_be_covered():
    with pytest.raises(UserError, match=r"no sharding rule matches blocks.new.table \(1024, 1024\); add a line to"):
        spec_for("blocks.new.table", (1024, 1024), mesh(fsdp=2))
    with pytest.raises(
        UserError, match=r"blocks.ffn_0.kernel .*: no axis can be cut into fsdp=11 x seq=1=11 parts; set"
    ):
        spec_for("blocks.ffn_0.kernel", (30, 1536, 8960), mesh(fsdp=11))


def test_another_axis_is_cut_if_the_rules_own_does_not_divide():
    # 1536 is no multiple of 7, 8960 is; the layers are never cut.
    assert spec_for("blocks.ffn_0.kernel", (30, 1536, 8960), mesh(fsdp=7)) == P(None, None, W)
    assert spec_for("blocks.ffn_0.kernel", (30, 1536, 8960), mesh(fsdp=7, seq=5)) == P(None, None, W)
    assert spec_for("blocks.self_attn.q.kernel", (30, 1535, 12, 128), mesh(fsdp=4)) == P(None, None, None, W)


def test_the_table_names_what_is_large():
    shapes = {"blocks.ffn_0.kernel": (30, 1536, 8960), "blocks.ffn_0.bias": (30, 8960)}
    on = mesh(fsdp=4, seq=2)
    leaves = {
        path: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(on, spec_for(path, shape, on)))
        for path, shape in shapes.items()
    }
    assert sharding_table(leaves) == "blocks.ffn_0.kernel  30 x 1536 x 8960  - x fsdp+seq x -  196.9 MiB"


def test_flat_leaves():
    leaves = {"a.q.kernel": jax.ShapeDtypeStruct((8, 2, 4), jnp.float32)}
    assert shardings(leaves, mesh(fsdp=4))["a.q.kernel"].spec == P(W, None, None)


def test_layers_know_the_axis_of_their_kernel_that_a_mesh_cuts():
    dit = nnx.eval_shape(lambda: WanDiT(WAN_1_3B, rngs=nnx.Rngs(0)))
    found = {}
    for path, layer in nnx.iter_modules(dit.blocks):
        if isinstance(layer, Projection):
            shape = layer.kernel.shape[1:]
            found[".".join(path)] = cut_axis(f"{'.'.join(path)}.kernel", shape), range(len(shape))[layer.cut]
    assert len(found) == 10
    assert all(rule == known for rule, known in found.values()), found
