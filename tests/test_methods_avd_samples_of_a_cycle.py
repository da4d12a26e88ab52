"""fake_score_samples="a_cycle": one rollout through all steps, whose x0 predictions all updates of fake_score share."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_methods_avd_half_rate import double
from training_cases import (
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
    train,
    use_devices,
    use_linear_network,
    write_inputs,
)

from avd_jax.errors import UserError
from avd_jax.methods.students import ROLLOUT, stream
from avd_jax.training.assembly import Assembly
from avd_jax.training.update import example_keys, make_shared

BATCH = make_batch(3)
KEYS = example_keys(jax.random.key(0), jnp.arange(3))
HALF = {"half_rate__steps": 2, "half_rate__interpolator": "given", "half_rate__positions": "consecutive"}
INTERPOLATOR = {"factor": jnp.float32(0.5)}


def samples(student, times):
    made = jax.jit(
        lambda: student.samples(
            linear_params(0), BATCH["prompts"], KEYS, INTERPOLATOR, shape=LATENTS_SHAPE, times=times
        )
    )
    return np.stack(made())


@pytest.mark.parametrize("half_rate", [False, True])
def test_they_are_those_of_rollouts_that_stop_at_each_step(half_rate):
    student = make_student(make_config(**HALF) if half_rate else make_config(), interpolator=double)
    stopped = jax.jit(lambda stop: student.x0(linear_params(0), BATCH["prompts"], KEYS, stop, INTERPOLATOR))
    expected = np.stack([stopped(stop) for stop in range(4)])
    found = samples(student, 7)
    distance = np.abs(found[:, None] - expected[None]).max(axis=(3, 4, 5, 6))  # [times stops B]
    stops = distance.argmin(axis=1)
    assert distance.min(axis=1).max() < 1e-4
    assert np.sort(distance, axis=1)[:, 1].min() > 1e-2, "the stops can be told apart"
    for order in stops.T:
        assert sorted(order[:4]) == [0, 1, 2, 3], "all of them once before any again"
        assert len(set(order[4:])) == 3
    assert len({tuple(order) for order in stops.T}) > 1, "each example has an order of its own"


def cycle(**fields):
    """Return what a cycle makes of a state, and the calls of the student's network."""
    calls = []
    base = {"fake_score_samples": "a_cycle", "fake_score_updates": 5, "batch_size": 4}
    rates = {"optimizer__learning_rate": 1e-3, "optimizer__fake_score_learning_rate": 1e-3}
    method = make_method(make_config(**base | rates | fields), recording(linear_network, calls, "student"))
    assembly = Assembly(method)
    frozen, batch = make_frozen(linear_params(2), np.zeros((8, 16), np.float32)), make_batch(4)
    fresh = {name: jax.tree.map(lambda x, n=n: np.stack([x] * n, axis=1), batch[name]) for name, n in FRESH.items()}
    assert assembly.fresh() == FRESH
    state = start_state(method, linear_params(0))
    batch = jax.tree.map(np.asarray, batch | fresh)
    state, metrics = assembly.dispatch(state, frozen, batch, jax.random.key(0), 0)
    jax.effects_barrier()
    return assembly, state, metrics, calls


FRESH = {"prompts": 2}


def test_a_cycle_rolls_out_once_for_all_updates_of_fake_score():
    assembly, state, metrics, calls = cycle(loss__regression=0.0)
    assert [len(metrics[name]) for name in ("fake_score", "generator")] == [5, 1]
    for network in state.networks.values():
        assert np.abs(np.asarray(network.params["mix"]) - linear_params(0)["mix"]).max() > 5e-4
    assert len({float(found["loss/fake_score"]) for found in metrics["fake_score"]}) == 5
    generators = sum(np.array_equal(call[1]["mix"], linear_params(0)["mix"]) for call in calls)
    # 4 of the shared rollout, 1 of fake_score's first update, which has moved afterwards, 1 to 4 of the generator's
    assert 6 <= generators <= 9
    assert len(calls) == generators + 4 + 1
    assert assembly.cycle()["batches"] == FRESH
    assert assembly.program_names()[:3] == ["generator_step", "fake_score_step", "fake_score_samples"]
    batches = next(part for part in assembly.parts() if part.name == "batches")
    sample = 4 * np.prod(LATENTS_SHAPE) * 4
    assert batches.device_gib * 2**30 > 2 * 5 * sample, "the samples of two cycles are in memory"


def test_the_samples_do_not_depend_on_accumulation():
    found = []
    for parts in (1, 2):
        config = make_config(fake_score_samples="a_cycle", batch_size=4, accumulation_steps=parts)
        method = make_method(config)
        make = jax.jit(make_shared(method, method.updates[0]))
        state, frozen = start_state(method, linear_params(0)), make_frozen(linear_params(2), np.zeros((8, 16)))
        batch = {name: make_batch(4)[name] for name in ("prompts", "canvas")}
        found.append(np.stack(make(state, frozen, batch, jax.random.key(3))["x0"]))
    assert found[0].shape == (5, 4, *LATENTS_SHAPE)
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-5)


def test_a_run_resumes_bit_for_bit_and_refuses_the_other_way(tmp_path, monkeypatch):
    use_linear_network(monkeypatch.setattr)
    use_devices(monkeypatch.setattr, 1)
    inputs = write_inputs(tmp_path / "inputs")

    def config(steps, **fields):
        base = {"fake_score_samples": "a_cycle", "batch_size": 2, "num_steps": steps, "sample_every": 0}
        return make_config(**inputs | base | {"checkpoint_every": 1} | fields)

    assert train(config(2), tmp_path / "straight") == 0
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "2")
    assert train(config(2), tmp_path / "resumed") == 0
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("straight", "resumed")]
    losses = [[line.split('"time/')[0] for line in run if '"loss/' in line] for run in lines]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    with pytest.raises(UserError, match=r"config\.fake_score_samples was 'a_cycle', is 'an_update'"):
        train(config(3, fake_score_samples="an_update"), tmp_path / "resumed")


def test_the_rollouts_noise_is_that_of_the_first_update():
    """So that the same seed begins with the same samples both ways."""
    student = make_student(make_config())
    stopped = student.x0(linear_params(0), BATCH["prompts"], KEYS, 0)
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), LATENTS_SHAPE))(stream(KEYS, ROLLOUT))
    velocity = linear_network(linear_params(0), noise, jnp.full(3, 1000.0), BATCH["prompts"])
    np.testing.assert_allclose(stopped, noise - velocity, atol=1e-5)
    distance = np.abs(samples(student, 4) - np.asarray(stopped)[None]).max(axis=(2, 3, 4, 5))
    assert distance.min(axis=0).max() < 1e-4
