"""Reports of programs, compiled here for the CPU's devices; the real figures come from libtpu (docs/pods.md)."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from avd_jax.capacity import compiling
from avd_jax.capacity.compiling import compile_program
from avd_jax.capacity.program import Program
from avd_jax.parallel.mesh import make_mesh, replicated

BATCH, WIDTH = 4, 32
ONCE = 2 * BATCH * WIDTH * WIDTH


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    monkeypatch.setattr(compiling, "memory_gib", lambda device_kind: 16)


def rollout(mesh):
    """A rollout to a drawn step with weights that are cut over the devices, and one step more."""

    @jax.jit
    def function(weights, x, key):
        stop = checkpoint_name(jax.random.randint(key, (), 0, 4), "draw/stop")
        return jax.lax.fori_loop(0, stop, lambda _, x: jnp.sin(x @ weights), x) @ weights

    def shaped(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*axes)))

    key = jax.ShapeDtypeStruct((), jax.eval_shape(lambda: jax.random.key(0)).dtype, sharding=replicated(mesh))
    args = shaped((WIDTH, WIDTH), "fsdp"), shaped((BATCH, WIDTH), "fsdp"), key
    return Program("rollout", function, args, tuple({"stop": stop} for stop in range(4)), dynamic_trips=1.5)


def test_a_programs_report():
    mesh = make_mesh(data=1, fsdp=4, seq=2)
    report, text = compile_program(rollout(mesh), mesh=mesh, batch_size=BATCH, topology="here")
    assert report.fits
    assert report.mesh == {"data": 1, "fsdp": 4, "seq": 2}
    assert report.argument_gib > 0
    assert report.argument_gib + report.temporary_gib <= report.total_gib < report.limit_gib == 16
    assert sum(report.collective_gib.values()) > 0
    assert report.flops == (1 + 1.5) * ONCE
    assert text.startswith("HloModule")
    written = json.loads(json.dumps(report.as_dict()))
    assert written["program"] == "rollout"
    assert set(written) == {
        *("program", "topology", "mesh", "batch_size", "argument_gib", "temporary_gib", "total_gib", "limit_gib"),
        *("fits", "code_mib", "flops", "cycles", "collective_gib", "trace_seconds", "compile_seconds", "error"),
    }
    assert report.as_text().startswith("rollout on here, mesh data=1 x fsdp=4 x seq=2, batch 4: fits\n")


def test_the_flops_are_all_devices_and_do_not_depend_on_the_mesh():
    one, eight = make_mesh(fsdp=1, devices=jax.devices()[:1]), make_mesh(data=1, fsdp=4, seq=2)
    counts = [compile_program(rollout(mesh), mesh=mesh, batch_size=4, topology="")[0].flops for mesh in (one, eight)]
    assert counts[0] == counts[1]


def test_memory_that_does_not_suffice_is_a_report():
    about = {"program": "a", "topology": "b", "mesh": {"seq": 1}, "batch_size": 1, "limit_gib": 16, "flops": 1.0}
    text = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm.\nExceeded"
    report = compiling._does_not_fit(about, RuntimeError(text), 3.0)
    assert (report.total_gib, report.fits) == (17.5, False)
    assert "DOES NOT FIT" in report.as_text()
    with pytest.raises(RuntimeError, match="another"):
        compiling._does_not_fit(about, RuntimeError("another"), 3.0)
