"""Names of TPU slices and GPUs, and what is said if their compilers are missing, locked or of another opinion."""

import json
import subprocess
import sys

import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from avd_jax.errors import UserError
from avd_jax.parallel import gpu_topology
from avd_jax.parallel.mesh import make_mesh
from avd_jax.parallel.topology import topology_devices, tpu_devices


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-16", "--topology v5e-16: there is no such slice; there are v5e:2x2, v5e:2x4, v5e:4x4"),
        ("v5e", "there are v5e:2x2"),
        (
            "v5f:4x4",
            "name one like v5e:4x4, v5p:2x2x4 or h100:8, of v4, v5e, v5p, v6e, h100, h200, a100, l40s, rtx4090",
        ),
        ("h10:8", "(did you mean 'h100'?)"),
        ("", "name one like v5e:4x4"),
        ("h100", "there are no such GPUs; there are h100:1, h100:8, and of several hosts h100:2x8, ..."),
        ("l40s:0x8", "there are no such GPUs; there are l40s:1"),
        ("a100:2x2x2", "there are no such GPUs; there are a100:1"),
        ("h100:12", "a host has 8 at most; write hosts x GPUs, such as h100:2x8"),
    ],
)
def test_a_name_that_is_none(name, message):
    with pytest.raises(UserError) as error:
        topology_devices(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        ("INVALID_ARGUMENT: Topology layout is not divisible", "--topology v5e:3x7: there is no such slice; there are"),
        ("Internal error when accessing libtpu multi-process lockfile.\nRun rm", "libtpu is locked by another process"),
        ("The TPU is already in use by process 7", "libtpu is locked by another process"),
        ("cannot open libtpu.so", 'cannot be loaded (cannot open libtpu.so); pip install "jax[tpu]"'),
    ],
)
def test_what_libtpu_says(monkeypatch, raised, message):
    def fail(*_, **__):
        raise RuntimeError(raised)

    monkeypatch.setattr(topologies, "get_topology_desc", fail)
    with pytest.raises(UserError) as error:
        tpu_devices("v5e:3x7")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_gpus_where_only_a_tpu_will_do():
    with pytest.raises(UserError, match="--topology h100:8: these are GPUs; name a TPU slice like v5e:2x2, of v4, v5e"):
        tpu_devices("h100:8")


def test_hosts_of_gpus():
    assert gpu_topology._parsed("h100:8")[1:] == (1, 8)
    assert gpu_topology._parsed("a100:3x8") == (gpu_topology.GPUS["a100"], 3, 8)
    with pytest.raises(UserError, match="--slices 2: GPUs have none; write h100:HOSTSxGPUS, such as h100:2x8"):
        topology_devices("h100:8", slices=2)


def test_the_compiler_for_gpus_is_missing(monkeypatch):
    monkeypatch.setattr(gpu_topology, "_MODULES", ("no_such.module",))
    with pytest.raises(UserError) as error:
        topology_devices("h100:8")
    assert 'comes with pip install "jax-cuda13-plugin==' in str(error.value)
    assert "\n" not in str(error.value)


def test_a_sharding_in_the_hosts_memory_is_another_one():
    plain = NamedSharding(make_mesh(), PartitionSpec("data"))
    waiting = gpu_topology._InHostMemory.of(plain)
    assert waiting.memory_kind == waiting.update(spec=PartitionSpec()).memory_kind == "pinned_host"
    assert waiting != plain
    assert waiting == gpu_topology._InHostMemory.of(plain)
    assert waiting.update(memory_kind="device") == plain


def test_programs_compile_for_gpus_that_are_not_there():
    """Attention by cuDNN among them, whose checks ask about the GPU; the workspace is counted."""
    if not all(map(gpu_topology._is_installed, gpu_topology._MODULES)):
        pytest.skip("needs the wheels of pyproject.toml's cuda-compiler")
    found = json.loads(subprocess.run([sys.executable, "-c", GPU_PROGRAM], capture_output=True, check=True).stdout)
    assert found == [["NVIDIA H100 80GB HBM3", 16, 2], 4 * 2 * 1024 * (64 + 1), True, 4 * 1024]


GPU_PROGRAM = """
import json, jax, jax.numpy as jnp
from avd_jax.capacity.hlo import cudnn_workspace
from avd_jax.parallel.topology import topology_devices
devices = topology_devices("h100:2x8")
x = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(devices[0]))
attend = lambda x: jnp.sum(jax.nn.dot_product_attention(x, x, x, implementation="cudnn").astype(jnp.float32))
text = jax.jit(jax.grad(attend)).trace(x).lower(lowering_platforms=("cuda",)).compile().as_text()
waiting = jax.sharding.NamedSharding(jax.sharding.Mesh(devices, ("x",)), jax.P()).with_memory_kind("pinned_host")
y = jax.ShapeDtypeStruct((1024,), jnp.float32, sharding=waiting)
double = jax.jit(lambda y: 2 * jax.device_put(y, jax.memory.Space.Device)).trace(y)
memory = double.lower(lowering_platforms=("cuda",)).compile().memory_analysis()
hosts = len({device.process_index for device in devices})
print(json.dumps([[devices[0].device_kind, len(devices), hosts], cudnn_workspace(text), "cudnn$fmha" in text,
                  memory.host_argument_size_in_bytes]))
"""
