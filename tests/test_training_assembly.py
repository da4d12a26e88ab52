"""Reports of programs, compiled here for the CPU's devices; the real figures come from libtpu (docs/pods.md)."""

import json
from functools import partial

import jax
import pytest
from avd_jax.training.aot import Plan, make_plan
from training_cases import DIT, make_config

from avd_jax.capacity import compiling
from avd_jax.capacity.planning import candidates
from avd_jax.capacity.program import expected_flops
from avd_jax.errors import UserError
from avd_jax.parallel.mesh import make_mesh

SHAPE = 3, 4, 4, 4
VIDEO = {"frames": 9, "height": 32, "width": 32}


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    monkeypatch.setattr(compiling, "memory_gib", lambda device_kind: 16)


def plan(**fields):
    config = make_config(batch_size=4, **fields)
    return Plan(config, DIT, SHAPE, make_mesh(data=1, fsdp=4, seq=2))


def test_a_programs_report():
    report, text = plan().compile("forward", topology="here")
    assert report.fits
    assert report.mesh == {"data": 1, "fsdp": 4, "seq": 2}
    assert report.argument_gib > 0
    assert report.argument_gib + report.temporary_gib <= report.total_gib < report.limit_gib == 16
    assert report.collective_gib["all-gather"] > 0
    assert text.startswith("HloModule")
    written = json.loads(json.dumps(report.as_dict()))
    assert written["program"] == "forward"
    assert {"argument_gib", "temporary_gib", "total_gib", "limit_gib", "flops", "compile_seconds"} <= set(written)
    assert report.as_text().startswith("forward on here, mesh data=1 x fsdp=4 x seq=2, batch 4: fits\n")


def test_the_flops_are_all_devices_and_do_not_depend_on_the_mesh():
    def flops(**sizes):
        return expected_flops(Plan(make_config(batch_size=4), DIT, SHAPE, make_mesh(**sizes)).program("student_sample"))

    assert flops(data=1, fsdp=1, seq=1, devices=jax.devices()[:1]) == flops(data=1, fsdp=4, seq=2)


def test_sample_videos_are_shared_out_where_there_are_fewer_than_shards():
    """Held whole by all 8, 2 videos would cost each device the activations of both."""

    def temporaries(prompts):
        config = make_config(batch_size=8, sample__prompts=prompts)
        return Plan(config, DIT, SHAPE, make_mesh(data=8)).compile("student_sample", topology="here")[0].temporary_gib

    assert temporaries(2) == temporaries(8) < temporaries(9)


@pytest.mark.parametrize("name", ["generator_step", "fake_score_step", "vae_decode"])
def test_every_program_can_be_traced(name):
    assert expected_flops(plan().program(name)) > 0


def test_sizes_come_from_the_config_or_are_asked_for():
    found = make_plan(make_config(model="1.3B", mesh__seq=2, batch_size=4), jax.devices(), **VIDEO)
    assert found.model.num_heads == 12
    assert found.latents_shape == (3, 4, 4, 16)
    with pytest.raises(UserError, match=r"config.model='': set it to one of 1.3B, 14B, or set init_from"):
        make_plan(make_config(), jax.devices(), **VIDEO)
    with pytest.raises(UserError, match=r"12 attention heads .* config.mesh.seq=8"):
        make_plan(make_config(model="1.3B", mesh__seq=8), jax.devices(), **VIDEO)


def test_planning_tries_what_divides_batch_and_heads():
    config = make_config(model="1.3B", batch_size=4)

    def tried(devices):
        return candidates(config, jax.devices()[:devices], partial(make_plan, devices=jax.devices()[:devices], **VIDEO))

    found = [(p.config.batch_size, p.mesh.shape["fsdp"], p.mesh.shape["seq"]) for p in tried(8)]
    # 8 devices: seq=8 does not divide 12 heads, fsdp=8 no batch of 4.
    assert found == [(4, 4, 2), (4, 2, 4), (8, 8, 1), (8, 4, 2), (8, 2, 4)]
    with pytest.raises(UserError, match=r"a batch of 4 .* cannot be shared out over data=5"):
        list(tried(5))
