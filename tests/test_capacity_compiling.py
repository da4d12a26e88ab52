"""Reports of programs, compiled here for the CPU's devices; the real figures come from libtpu (docs/pods.md)."""

import json
import math

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from avd_jax.capacity import compiling
from avd_jax.capacity.compiling import compile_program
from avd_jax.capacity.devices import find_kind
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
    assert report.assumed_trips == 1.5
    assert "1.5 trips of loops of unknown length" in report.as_text()
    assert text.startswith("HloModule")
    written = json.loads(json.dumps(report.as_dict()))
    assert written["program"] == "rollout"
    assert set(written) == {
        *("program", "topology", "mesh", "batch_size", "argument_gib", "temporary_gib", "total_gib", "limit_gib"),
        *("fits", "code_mib", "flops", "kernel_flops", "cycles", "seconds", "collective_gib", "trace_seconds"),
        *("host_gib", "resident_gib", "resident_host_gib", "compile_seconds", "error", "assumed_trips", "loops"),
    }
    assert report.as_text().startswith("rollout on here, mesh data=1 x fsdp=4 x seq=2, batch 4: fits\n")


def test_the_flops_are_all_devices_and_do_not_depend_on_the_mesh():
    one, eight = make_mesh(fsdp=1, devices=jax.devices()[:1]), make_mesh(data=1, fsdp=4, seq=2)
    counts = [compile_program(rollout(mesh), mesh=mesh, batch_size=4, topology="")[0].flops for mesh in (one, eight)]
    assert counts[0] == counts[1]


def test_what_a_run_holds_anyway_is_told_apart(monkeypatch):
    """Of the arguments that the compiled program has: it drops those that it does not read."""
    mesh = make_mesh(data=1, fsdp=8)

    def shaped(rows, *axes):
        return jax.ShapeDtypeStruct((rows, 1024), jnp.float32, sharding=NamedSharding(mesh, P(*axes)))

    def function(held, unread, own):
        return jnp.sum(held["a"]) + own

    args = {"a": shaped(8 * 1024, "fsdp")}, shaped(4096), shaped(2048)
    program = Program("p", jax.jit(function), args, resident=(0, 1))
    report, _ = compile_program(program, mesh=mesh, batch_size=4, topology="here")
    assert report.resident_gib == pytest.approx(4 / 1024)
    assert report.argument_gib == pytest.approx((4 + 8) / 1024)


@pytest.mark.parametrize(
    ("text", "total"),
    [
        # The two wordings of libtpu 0.0.42.1; both count the arguments.
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded hbm "
            "capacity by 1.75G.\nTotal hbm usage >= 17.75G",
            17.5,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (64.00G) "
            "exceeds available HBM (15.75G).",
            64.0,
        ),
        ("RESOURCE_EXHAUSTED: in other words", math.inf),
    ],
)
def test_memory_that_does_not_suffice_is_a_report(text, total):
    about = {"program": "a", "topology": "b", "mesh": {"seq": 1}, "batch_size": 1, "limit_gib": 16, "flops": 1.0}
    report = compiling._does_not_fit(about, 2.0, RuntimeError(text))
    assert (report.total_gib, report.fits) == (total, False)
    assert "DOES NOT FIT" in report.as_text()
    assert json.loads(json.dumps(report.as_dict()))["total_gib"] == (total if total < math.inf else None)


def test_another_failure_of_the_compiler_is_raised():
    with pytest.raises(RuntimeError, match="another"):
        compiling._does_not_fit({}, 2.0, RuntimeError("another"))


V5E, H100 = find_kind("TPU v5 lite"), find_kind("NVIDIA H100 80GB HBM3")
WORK = {"flops": 3e12, "kernel_flops": 1e12, "collective_gib": {"all-gather": 1.0, "all-reduce": 0.5}}


@pytest.mark.parametrize(
    ("kind", "work", "seconds"),
    [
        # Cycles at 1.5 GHz, attention at half of 197 TFLOPs a second, 2 GiB at 200 GB a second.
        (V5E, {"cycles": 3_000_000_000}, 2 + 1 / 98.5 + 2 * 2**30 / 200e9),
        # No cycles: all products at half of 989 TFLOPs a second; 450 GB a second within a host, 50 between two.
        (H100, {"cycles": None}, 3 / 494.5 + 2 * 2**30 / 450e9),
        (H100, {"cycles": None, "hosts": 2}, 3 / 494.5 + 2 * 2**30 / 50e9),
        (H100, {"cycles": 5}, None),
        (None, {"cycles": 5}, None),
    ],
)
def test_the_estimate_is_arithmetic_attention_and_collectives(kind, work, seconds):
    assert compiling.estimated_seconds(kind, **WORK, **work) == (seconds and pytest.approx(seconds))
