"""What a cycle costs, counted from its programs, against a count of the networks' evaluations while they run."""

import collections
import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import (
    DIT,
    LATENTS_SHAPE,
    linear_network,
    linear_params,
    make_batch,
    make_config,
    make_frozen,
    make_method,
    make_student,
    recording,
    start_state,
    steps_of,
)

from avd_jax.capacity.flops import count_flops
from avd_jax.methods.programs import unit
from avd_jax.models.functional import make_denoiser
from avd_jax.training.assembly import Assembly
from avd_jax.training.cost import CycleCost, cycle_cost, seconds_at_peak

FROZEN = make_frozen(linear_params(2), np.zeros((8, 16), np.float32))


def counted(config):
    """Run both updates until each stop was seen; return {stop: evaluations} of the generator's and of fake_score's."""
    calls, batch = [], make_batch(1)
    method = make_method(
        config, recording(linear_network, calls, "student"), recording(linear_network, calls, "teacher")
    )
    state, steps = start_state(method, linear_params(0)), steps_of(method)
    found = {name: {} for name in steps}
    steps = {name: jax.jit(step) for name, step in steps.items()}
    for seed in range(40):
        key = jax.random.key(seed)
        stop = int(make_student(config).stop_step(key))
        if stop in found["generator"]:
            continue
        for name, step in steps.items():
            calls.clear()
            step(state, FROZEN, batch, key)
            jax.effects_barrier()
            found[name][stop] = collections.Counter(name for name, *_ in calls)
    return found["generator"], found["fake_score"]


def full_cost(**fields):
    """The cost of a cycle of the tiny transformer, in its forward passes, by network."""
    config = make_config(remat="block", batch_size=2, **fields)
    network = make_denoiser(DIT, dtype="float32", param_dtype="float32", remat=config.remat)
    teacher = make_denoiser(DIT, dtype="float32", param_dtype="float32", remat="none")
    method = make_method(config, network, teacher, abstract=network.abstract_params())
    frozen = {
        "teacher": SimpleNamespace(abstract=teacher.abstract_params()),
        "negative": SimpleNamespace(abstract={"prompt_embeds": jax.ShapeDtypeStruct((8, 16), jnp.float32)}),
    }
    method = dataclasses.replace(method, frozen=frozen, unit=partial(unit, network, DIT))
    found = cycle_cost(Assembly(method))
    return {name: found.in_units(flops) for name, flops in found.updates.items()}, found


@pytest.mark.parametrize("off", [(), ("distribution_matching", "temporal")])
def test_cost_is_what_the_updates_evaluate(off):
    """A backward pass is worth two forward passes and remat one more, but for the ends of the transformer."""
    config = make_config(**{f"loss__{term}": 0.0 for term in off})
    generator, fake_score = counted(config)
    assert set(generator) == {0, 1, 2, 3}
    scores = "distribution_matching" not in off
    rollout = scores or "temporal" not in off
    for stop in range(4):
        assert generator[stop] == collections.Counter(
            student=rollout * (stop + 1) + scores + ("regression" not in off), teacher=2 * scores
        )
        assert fake_score[stop] == collections.Counter(student=stop + 2)
    with_gradient = rollout + ("regression" not in off)
    passes, found = full_cost(**{f"loss__{term}": 0.0 for term in off})
    evaluations = sum(count.total() for count in generator.values()) / 4
    assert passes["generator"] == pytest.approx(evaluations + 3 * with_gradient, rel=0.06)
    assert passes["fake_score"] == pytest.approx(sum(c.total() for c in fake_score.values()) / 4 + 3, rel=0.06)
    assert found.flops == found.updates["generator"] + 5 * found.updates["fake_score"]


def test_the_papers_cycle_is_45_passes_to_the_ends_of_the_transformer():
    """Rollouts that always run to the end, as the authors' do, need 54."""
    _, found = full_cost()
    assert found.in_units(found.flops) == pytest.approx(45, rel=0.06)
    assert found.as_text().startswith("one cycle (5 fake_score updates, 1 generator update) costs 4")
    assert " forward passes of the DiT an example: 6." in found.as_text()
    passes, backward = 4, 2 + 1  # the rollout; a gradient's share, with the forward pass that remat runs again
    generator = passes + backward + 1 + 2 + (1 + backward)
    fake_score = passes + (1 + backward)
    assert generator + 5 * fake_score == 54


def test_a_longer_rollout_costs_its_passes():
    """Each update that samples makes half a pass more for each further step, whatever else it does."""
    four, one = full_cost()[0], full_cost(student__timesteps=(1000.0,))[0]
    for name in four:
        assert four[name] - one[name] == pytest.approx(1.5, rel=1e-3)


def test_half_rate_steps_cost_what_their_frames_cost():
    config = make_config(half_rate__steps=2, half_rate__positions="consecutive", remat="block", batch_size=2)
    network = make_denoiser(DIT, dtype="float32", param_dtype="float32", remat="block")
    student = make_student(config, network, lambda params, x0: jnp.repeat(x0, 2, axis=1)[:, :-1])

    def forward(frames: int) -> float:
        shape = jax.ShapeDtypeStruct((1, frames, *LATENTS_SHAPE[1:]), jnp.float32)
        conditions = {"prompt_embeds": jax.ShapeDtypeStruct((1, 8, 16), jnp.float32)}
        time = jax.ShapeDtypeStruct((1,), jnp.float32)
        return count_flops(network, network.abstract_params(), shape, time, conditions)

    full, half = forward(3), forward(2)
    method = make_method(config, network, abstract=network.abstract_params(), interpolator=student.interpolator)
    method = dataclasses.replace(
        method, frozen={"interpolator": SimpleNamespace(abstract={})}, networks=method.networks
    )
    updates = cycle_cost(Assembly(dataclasses.replace(method, updates=method.updates[:1], main="fake_score"))).updates
    plain = make_method(make_config(remat="block", batch_size=2), network, abstract=network.abstract_params())
    whole = cycle_cost(Assembly(dataclasses.replace(plain, updates=plain.updates[:1], main="fake_score"))).updates
    # Rollouts of 1, 2, 3 and 4 passes, of which the first two are at half rate.
    saved = 2 * (full - half) * (1 + 2 + 2 + 2) / 4
    assert whole["fake_score"] - updates["fake_score"] == pytest.approx(saved, rel=1e-6)


def test_more_devices_would_take_less_time_and_unknown_ones_nobody_knows():
    found = CycleCost({"generator": 3e12, "fake_score": 1e12}, {"generator": 1, "fake_score": 5}, 8)
    assert found.flops == 8e12

    def seconds(devices: int, kind: str):
        mesh = SimpleNamespace(devices=SimpleNamespace(flat=[SimpleNamespace(device_kind=kind)]), size=devices)
        return seconds_at_peak(SimpleNamespace(method=SimpleNamespace(mesh=mesh)), found)

    assert seconds(1, "TPU v5 lite") == 8e12 / 197e12
    assert seconds(4, "TPU v5 lite") == pytest.approx(seconds(1, "TPU v5 lite") / 4)
    assert seconds(1, "cpu") is None


def test_a_method_without_a_unit_says_its_flops():
    found = CycleCost({"vae": 3e9}, {"vae": 1}, 3)
    assert found.as_text() == "one cycle (1 vae update) costs 1e+09 FLOPs an example"
