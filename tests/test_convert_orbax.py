"""Our own layout: stored so that each of several hosts reads little but what its devices hold."""

import math

import jax
import numpy as np
import pytest
import tensorstore
from jax.sharding import AbstractMesh, AxisType

from avd_jax.convert import orbax_io
from avd_jax.convert.architectures import WAN_DIT
from avd_jax.models.wan_dit import WAN_1_3B, WAN_14B
from avd_jax.parallel.mesh import AXES
from avd_jax.parallel.rules import shardings


def nbytes(shape, leaf):
    return math.prod(shape) * np.dtype(leaf.dtype).itemsize


def chunks_of(path, leaf):
    return orbax_io.chunk_shape(path, leaf) or list(leaf.shape)


@pytest.mark.parametrize(("config", "devices", "per_host"), [(WAN_1_3B, 16, 4), (WAN_1_3B, 24, 8), (WAN_14B, 64, 4)])
def test_hosts_read_together_little_more_than_all_of_it(config, devices, per_host):
    leaves = WAN_DIT.leaves(config)
    mesh = AbstractMesh((1, devices, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    read = 0
    for path, sharding in shardings(leaves, mesh).items():
        shape, chunk = leaves[path].shape, chunks_of(path, leaves[path])
        local = sharding.shard_shape(shape)
        axis = next((i for i in range(len(shape)) if shape[i] != local[i]), None)
        if axis is None:
            read += nbytes(shape, leaves[path]) * devices // per_host
            continue
        part = local[axis] * per_host
        for start in range(0, shape[axis], part):
            rows = math.ceil((start + part) / chunk[axis]) - start // chunk[axis]
            read += nbytes(shape, leaves[path]) * rows * chunk[axis] // shape[axis]
    assert read < 1.1 * sum(nbytes(leaf.shape, leaf) for leaf in leaves.values())


def test_chunks_are_neither_tiny_nor_huge():
    for config, most in ((WAN_1_3B, 1500), (WAN_14B, 12_000)):
        shapes = {path: chunks_of(path, leaf) for path, leaf in WAN_DIT.leaves(config).items()}
        leaves = WAN_DIT.leaves(config)
        assert sum(math.prod(leaves[path].shape) // math.prod(chunk) for path, chunk in shapes.items()) < most
        cut = {path for path in leaves if orbax_io.chunk_shape(path, leaves[path])}
        assert max(nbytes(shapes[path], leaves[path]) for path in cut) < 40e6


def test_the_chunks_are_those_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_io, "_LEAST_CHUNK", 100)
    values = {"blocks.ffn_0.kernel": np.arange(2 * 12 * 4, dtype=np.float32).reshape(2, 12, 4)}
    values["blocks.ffn_0.bias"] = np.arange(8, dtype=np.float32).reshape(2, 4)
    leaves = {path: jax.ShapeDtypeStruct(value.shape, value.dtype) for path, value in values.items()}
    orbax_io.write_leaves(tmp_path / "x", leaves, values.get)
    base = {"driver": "ocdbt", "base": f"file://{tmp_path}/x/", "path": "blocks.ffn_0.kernel/"}
    store = tensorstore.open({"driver": "zarr", "kvstore": base}).result()
    assert store.chunk_layout.read_chunk.shape == (2, 4, 4)
    for path, value in orbax_io.read_arrays(tmp_path / "x", leaves):
        np.testing.assert_array_equal(value, values[path])
