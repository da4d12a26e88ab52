"""A run put together without being run: its programs, what they hold, and what they would cost."""

import json
from types import SimpleNamespace

import jax
import pytest
from training_cases import DIT, make_config, write_inputs

from avd_jax.capacity import compiling
from avd_jax.capacity.compiling import compile_program
from avd_jax.capacity.planning import candidates
from avd_jax.capacity.program import expected_flops
from avd_jax.errors import UserError
from avd_jax.methods.avd import RECIPE
from avd_jax.methods.avd.config import default_config
from avd_jax.training import cost
from avd_jax.training.assembly import Assembly
from avd_jax.training.cost import cycle_cost, whole_run

VIDEO = {"frames": 9, "height": 32, "width": 32}


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    for module in (compiling, cost):
        monkeypatch.setattr(module, "memory_gib", lambda device_kind: 16)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def assemble(inputs, *, devices=None, **fields):
    base = {"batch_size": 4, "mesh__data": 1, "mesh__fsdp": 4, "mesh__seq": 2}
    return Assembly(RECIPE.build(make_config(**inputs | base | fields), devices=devices))


def compiled(assembly, name):
    return compile_program(assembly.program(name), mesh=assembly.mesh, batch_size=4, topology="here")


def size_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_a_programs_report(inputs):
    report, text = compiled(assemble(inputs), "forward")
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


def test_the_flops_are_all_devices_and_do_not_depend_on_the_mesh(inputs):
    def flops(**fields):
        return expected_flops(assemble(inputs, **fields).program("student_sample"))

    one = {"mesh__fsdp": 1, "mesh__seq": 1, "devices": jax.devices()[:1]}
    assert flops(**one) == flops()


def test_the_cost_of_a_cycle_does_not_depend_on_the_mesh(inputs):
    """Nor, in forward passes an example, on the batch."""
    one = {"mesh__fsdp": 1, "mesh__seq": 1, "devices": jax.devices()[:1]}
    alone = cycle_cost(assemble(inputs, **one))
    for fields in ({}, {"batch_size": 8, "mesh__fsdp": 8, "mesh__seq": 1}):
        found = cycle_cost(assemble(inputs, **fields))
        for name, flops in found.updates.items():
            assert found.in_units(flops) == pytest.approx(alone.in_units(alone.updates[name]), rel=1e-6)


def test_sample_videos_are_shared_out_if_there_are_fewer_than_shards(inputs):
    """Held whole by all 8, 2 videos would cost each device the activations of both."""

    def temporaries(prompts):
        fields = {"batch_size": 8, "mesh__data": 8, "mesh__fsdp": 1, "mesh__seq": 1, "sample__prompts": prompts}
        return compiled(assemble(inputs, **fields), "student_sample")[0].temporary_gib

    assert temporaries(2) == temporaries(8) < temporaries(9)


def test_every_program_of_a_run_with_half_rate_steps_can_be_traced(inputs):
    """It needs no weights of an interpolator, whose sizes are then the paper's."""
    assembly = assemble(inputs, half_rate__steps=2)
    names = assembly.program_names()
    assert names == [
        *("generator_step", "fake_score_step", "student_sample", "student_sample_half_rate", "teacher_sample"),
        *("vae_decode", "vae_encode", "forward", "generate_int8", "generate_fp8"),
    ]
    assert all(expected_flops(assembly.program(name)) > 0 for name in names)


def test_what_a_whole_run_holds(inputs):
    """By shapes alone: no program is compiled."""
    assembly = assemble(inputs, ema_decay=0.9, sample__teacher_steps=2)
    reports = {
        name: SimpleNamespace(program=name, total_gib=2.0, resident_gib=0.5, host_gib=0.0, resident_host_gib=0.0)
        for name in assembly.run_programs()
    }
    found = whole_run(assembly, reports, "here")
    parts = {part.name: part.device_gib for part in found.parts}
    assert set(parts) == {
        *("generator", "generator_optimizer", "generator_ema", "fake_score", "fake_score_optimizer"),
        *("teacher", "negative", "batches", "a checkpoint that is written"),
    }
    assert parts["generator_optimizer"] == pytest.approx(2 * parts["generator_ema"], rel=1e-3)
    assert {(need.stage, need.program) for need in found.needs} == {
        *(("training", f"{network}_step") for network in ("generator", "fake_score")),
        *(("samples", name) for name in ("teacher_sample", "student_sample", "vae_decode")),
        *(("encoding", "vae_encode"), ("generation", "teacher_sample"), ("generation", "vae_decode")),
    }
    resident = sum(parts.values())
    assert found.needs[0].total_gib == pytest.approx(resident + 2.0 - 0.5)
    assert found.needs[-1].total_gib == 2.0, "generation holds no run"
    off = assemble(inputs, sample_every=0, optimizer__memory="host")
    assert "samples" not in {stage.name for stage in off.stages()}
    moments = next(part for part in off.parts() if part.name == "generator_optimizer")
    assert moments.device_gib < 0.2 * moments.host_gib, "vectors stay on the device"


def test_a_program_that_a_config_does_not_have(inputs):
    with pytest.raises(UserError, match=r"generator_stp: .* no such program \(did you mean 'generator_step'"):
        assemble(inputs).program("generator_stp")
    regression = assemble(inputs, loss__distribution_matching=0.0, loss__temporal=0.0)
    with pytest.raises(UserError, match="--programs fake_score_step: this config has no such program"):
        regression.program("fake_score_step")


def test_regression_alone_holds_neither_fake_score_nor_teacher(inputs):
    """Which is half of what the trained networks of a distillation hold."""
    whole = assemble(inputs)
    regression = assemble(inputs, loss__distribution_matching=0.0, loss__temporal=0.0)
    assert set(regression.abstract.networks) == {"generator"}
    assert set(regression.method.frozen) == set()
    assert size_of(regression.abstract.networks) == size_of(whole.abstract.networks) / 2
    held = [size_of(assembly.program("generator_step").args[:2]) for assembly in (whole, regression)]
    assert held[1] < 0.5 * held[0]
    assert regression.fresh() == {"prompts": 0}
    assert whole.fresh() == {"prompts": 6}


def test_nothing_to_train_is_named(inputs):
    off = {"loss__distribution_matching": 0.0, "loss__regression": 0.0, "loss__temporal": 0.0}
    with pytest.raises(UserError, match=r"has weight 0.* one of distribution_matching, temporal, regression"):
        assemble(inputs, **off)


def build(config, devices=None):
    return Assembly(RECIPE.build(config, devices=devices, video=VIDEO))


def test_sizes_come_from_the_config_or_are_asked_for():
    found = build(make_config(model="1.3B", mesh__seq=2, batch_size=4))
    assert found.method.record()["architecture"]["config"]["num_heads"] == 12
    assert found.method.fields["latents"].abstract.shape == (4, 3, 4, 4, 16)
    with pytest.raises(UserError, match=r"config.model='': set it to one of 1.3B, 14B, or set init_from"):
        build(make_config())
    with pytest.raises(UserError, match=r"12 attention heads .* config.mesh.seq=8"):
        build(make_config(model="1.3B", mesh__seq=8))


def test_planning_tries_what_divides_batch_and_heads():
    def tried(devices):
        devices = jax.devices()[:devices]
        config = make_config(model="1.3B", batch_size=4)
        return list(candidates(config, devices, lambda changed: build(changed, devices)))

    found = [(a.rows.batch_size, a.mesh.shape["fsdp"], a.mesh.shape["seq"]) for a in tried(8)]
    # 8 devices: seq=8 does not divide 12 heads, fsdp=8 no batch of 4.
    assert found == [(4, 4, 2), (4, 2, 4), (8, 8, 1), (8, 4, 2), (8, 2, 4)]
    with pytest.raises(UserError, match=r"a batch of 4 .* cannot be shared out over data=5"):
        tried(5)


def test_the_full_size_state_of_a_distillation():
    """1.3B: parameters and moments of two networks in float32, as configs/wan13b.py says."""
    config = default_config()
    config.model, config.batch_size = "1.3B", 8
    state = build(config).abstract
    assert sum(leaf.size for leaf in jax.tree.leaves(state.networks["generator"].params)) == 1_418_996_800
    assert 34e9 < size_of(state) < 34.1e9


def test_the_tiny_sizes_are_those_of_the_weights(inputs):
    assert assemble(inputs).method.record()["architecture"]["config"]["dim"] == DIT.dim
