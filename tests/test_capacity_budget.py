"""The memory of a whole run: what is resident, and what counts beside it."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from avd_jax.capacity.budget import GIB, LESS_MEMORY, Need, Part, Stage, Verdict, needs_of, part_of
from avd_jax.parallel.mesh import make_mesh

STATE, FROZEN = Part("state", 6.0), Part("frozen", 1.0, host_gib=4.0)
STAGES = (
    Stage("training", ("step", "another_step")),
    Stage("samples", ("sample", "decode")),
    Stage("generation", ("decode",), beside_the_run=False),
)


def report(name, total, resident=0.0, host=0.0, resident_host=0.0):
    numbers = {"total_gib": total, "resident_gib": resident, "host_gib": host, "resident_host_gib": resident_host}
    return SimpleNamespace(program=name, **numbers)


REPORTS = {
    "step": report("step", 9.5, resident=7.0, host=4.0, resident_host=4.0),
    "sample": report("sample", 6.5, resident=3.0, host=0.5),  # it reads a half of the state
    "decode": report("decode", 5.0),
}


def verdict(limit=16.0, host_limit=None, reports=REPORTS):
    needs = needs_of(STAGES, [STATE, FROZEN], reports)
    about = {"topology": "t", "mesh": {"fsdp": 8}, "batch_size": 8}
    limits = {"limit_gib": limit, "host_limit_gib": host_limit, "devices_a_host": 4}
    return Verdict(parts=[STATE, FROZEN], needs=needs, **about, **limits)


def test_what_a_step_is_given_counts_once():
    assert verdict().needs == [
        Need("training", "step", beside_gib=7.0, program_gib=2.5, host_gib=4.0),
        Need("samples", "sample", beside_gib=7.0, program_gib=3.5, host_gib=4.5),
        Need("samples", "decode", beside_gib=7.0, program_gib=5.0, host_gib=4.0),
        Need("generation", "decode", beside_gib=0.0, program_gib=5.0, host_gib=0.0),
    ]


def test_a_program_that_fits_alone_may_not_fit_beside_the_run():
    found = verdict(limit=11.9)
    assert found.largest.program == "decode"
    assert found.largest.total_gib == 12.0
    assert not found.fits
    assert verdict(limit=12.0).fits


def test_the_hosts_count_for_all_of_their_devices():
    assert verdict().host_gib == 4 * 4.5
    assert not verdict(host_limit=17.9).fits
    assert verdict(host_limit=18.0).fits


def test_one_table_and_one_object_say_it_all():
    text = verdict(limit=11.0).as_text()
    assert text.startswith(
        "the whole run on t, mesh fsdp=8, batch 8: DOES NOT FIT, 12.00 GiB a device of 11.00, 18 GiB"
    )
    assert [line for line in text.splitlines() if "<- the largest" in line] == [
        "    samples: decode                      7.00 + 5.00 =     12.00      16.0  <- the largest"
    ]
    found = json.loads(json.dumps(verdict().as_dict()))["verdict"]
    assert found["fits"] is True
    assert found["largest"] == ["samples", "decode"]
    assert sum(part["device_gib"] for part in found["resident"]) == 7.0


def test_what_jax_takes_of_a_gpu_by_itself_may_be_too_little():
    found = dataclasses.replace(verdict(), default_gib=11.9)
    assert found.as_text().endswith("run it with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95: else JAX takes 11.9 GiB")
    assert "FRACTION" not in dataclasses.replace(found, default_gib=12.0).as_text()
    assert "FRACTION" not in dataclasses.replace(found, limit_gib=11.0).as_text()


def test_a_size_that_the_compiler_does_not_tell_fits_nowhere():
    found = verdict(reports=REPORTS | {"another_step": report("another_step", math.inf)})
    assert not found.fits
    assert "training: another_step" in found.as_text()
    assert found.as_text().endswith(LESS_MEMORY)
    assert LESS_MEMORY not in verdict(limit=11.0).as_text()  # decoding does not take less then
    assert json.loads(json.dumps(found.as_dict()))["verdict"]["total_gib"] is None


def test_the_share_of_one_device_by_shape_and_memory():
    mesh = make_mesh(data=1, fsdp=4, seq=2)

    def shaped(spec, memory="device"):
        sharding = NamedSharding(mesh, spec, memory_kind=memory)
        return jax.ShapeDtypeStruct((64, 1024, 1024), jnp.bfloat16, sharding=sharding)

    tree = {"cut": shaped(P("fsdp")), "whole": shaped(P()), "host": shaped(P(("fsdp", "seq")), "pinned_host")}
    found = part_of("x", tree)
    assert found.device_gib == pytest.approx((1 / 4 + 1) * 64 * 2**21 / GIB)
    assert found.host_gib == pytest.approx(64 * 2**21 / 8 / GIB)
