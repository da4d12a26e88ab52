"""rCM as a method: what its updates compute, which parts there are, its warm-up, and that a run resumes bit for bit."""

import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import (
    LATENTS_SHAPE,
    linear_network,
    linear_params,
    make_batch,
    make_frozen,
    run_method,
    start_state,
    use_linear_network,
    write_inputs,
)

from avd_jax.diffusion.flow import sigma_of_timestep
from avd_jax.errors import UserError
from avd_jax.fields import flatten
from avd_jax.methods import transformers
from avd_jax.methods.rcm import RECIPE, method
from avd_jax.methods.rcm.config import default_config
from avd_jax.methods.rcm.terms import counts, fake_score_update, generator_updates
from avd_jax.methods.students import Student
from avd_jax.models.wan_dit import WanDiTConfig
from avd_jax.parallel.hosts import to_host
from avd_jax.parallel.mesh import make_mesh
from avd_jax.training.assembly import Assembly
from avd_jax.training.method import Method, Trained
from avd_jax.training.optimizers import power_decay, warmed_up
from avd_jax.training.update import example_keys, passes_of

CONFIGS = Path(__file__).parents[1] / "configs"


def make_config(**fields):
    config = default_config()
    settings = {"compute_dtype": "float32", "teacher_dtype": "float32", "remat": "none", "batch_size": 4}
    settings |= {"consistency__warmup": 2, "fake_score_updates": 2, "optimizer__warmup_steps": 2}
    settings |= {"optimizer__learning_rate": 1e-3, "sample_every": 0}
    for name, value in (settings | fields).items():
        *parents, leaf = name.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return config


def make_method(config):
    student = Student(linear_network, tuple(config.student.timesteps), LATENTS_SHAPE, random_shift=5.0)
    trained = Trained(
        jax.eval_shape(linear_params),
        lambda shardings: linear_params(),
        warmed_up(config.optimizer, config.optimizer.learning_rate),
        power_decay(config.ema_power),
    )
    updates = generator_updates(config, student, linear_network, linear_network)
    if config.loss.distribution_matching:
        updates = (fake_score_update(config, student), *updates)
    return Method(
        name="rcm",
        main="generator",
        mesh=make_mesh(devices=jax.devices()[:1]),
        networks={"generator": trained, "fake_score": trained},
        updates=updates,
        fields=transformers.encoded_fields(4, LATENTS_SHAPE, WanDiTConfig(text_len=8, text_dim=16)),
        batches=lambda fresh: iter(()),
        extras={"counts": counts},
    )


FROZEN = make_frozen(linear_params(3), np.ones((8, 16), np.float32))


def run_cycles(config, cycles):
    """Return the states after each cycle and the metrics of the last."""
    assembly = Assembly(make_method(config))
    batch = make_batch()
    fresh = assembly.fresh()["prompts"]
    cycle = {name: jax.tree.map(np.asarray, batch[name]) for name in ("latents", "captions", "canvas")}
    cycle["prompts"] = jax.tree.map(lambda x: np.stack([np.asarray(x)] * max(fresh, 1), axis=1), batch["prompts"])
    state, states = start_state(assembly.method, linear_params(1)), []
    for number in range(cycles):
        state, metrics = assembly.dispatch(state, FROZEN, cycle, jax.random.fold_in(jax.random.key(0), number), number)
        states.append(jax.device_get(state))
    return states, metrics


def changed(before, after, network):
    sides = (jax.tree.leaves(state.networks[network].params) for state in (before, after))
    return any((one != other).any() for one, other in zip(*sides, strict=True))


def test_the_warm_up_has_consistency_alone_and_the_cycles_after_it_have_all():
    states, metrics = run_cycles(make_config(), 4)
    first, last_of_warmup, after, later = states
    assert [int(state.step) for state in states] == [1, 2, 3, 4]
    assert changed(first, last_of_warmup, "generator")
    assert not changed(first, last_of_warmup, "fake_score")
    assert changed(last_of_warmup, after, "fake_score")
    assert changed(after, later, "generator")
    assert {name: int(n) for name, n in later.extras["counts"].items()} == {"generator": 4, "fake_score": 4}
    (found,) = metrics["generator"]
    assert found["consistency/strength"] == 1
    assert found["loss/consistency"] == pytest.approx(0.5, abs=0.01)  # of a tangent of unit size
    assert found["loss/distribution_matching"] > 0
    assert len(metrics["fake_score"]) == 2


def test_the_rollouts_have_every_length_in_turn():
    config = make_config()
    for update in make_method(config).updates:
        for draw in update.draws:
            extras = [{"counts": {"generator": jnp.int32(n), "fake_score": jnp.int32(n)}} for n in range(6)]
            assert [int(draw.function(jax.random.key(0), one)) for one in extras] == [0, 1, 2, 3, 0, 1]
            assert draw.outcomes == (0, 1, 2, 3)


@pytest.mark.parametrize("done", [0, 5])
def test_the_tangent_is_that_of_the_guided_teachers_flow(done):
    """Against central differences of the student's velocity; at the start of the warm-up a regression."""
    config = make_config(guidance_scale=3.0, consistency__warmup=5)
    (along_flow,) = [v for v in make_method(config).updates[-1].values if v.name == "along_flow"]
    batch, params, teacher = make_batch(), linear_params(1), FROZEN["teacher"]
    given = {"latents": batch["latents"], "captions": batch["captions"], "negative": FROZEN["negative"]}
    keys = example_keys(jax.random.key(0), jnp.arange(4))
    found = along_flow.function(
        generator=params, teacher=teacher, keys=keys, counts={"generator": jnp.int32(done)}, **given
    )
    xt, times, text = found["xt"], found["timesteps"], batch["captions"]
    negative = {"prompt_embeds": jnp.broadcast_to(FROZEN["negative"]["prompt_embeds"], (4, 8, 16))}
    uncond, cond = (linear_network(teacher, xt, times, c) for c in (negative, text))
    flow = uncond + 3.0 * (cond - uncond)
    sigma = sigma_of_timestep(times)[:, None, None, None, None]
    velocity = linear_network(params, xt, times, text)
    if done:
        step = 1e-2  # the linear network is of second degree along a line: differences are exact
        ends = [linear_network(params, xt + sign * step * flow, times + sign * step * 1000, text) for sign in (1, -1)]
        change = (ends[0] - ends[1]) / (2 * step)
        a = jnp.sqrt((1 - sigma) ** 2 + sigma**2)
        expected = (1 - sigma) * a * (flow - velocity - sigma * change)
    else:
        expected = -(1 - sigma) * (velocity - flow)
    measured = found["measured"]["tangent"][:, None, None, None, None] * found["direction"]
    np.testing.assert_allclose(measured, expected, rtol=0, atol=2e-3 * float(jnp.abs(expected).max()))


def test_every_part_stands_alone():
    def fields(config):
        updates = make_method(config).updates
        return {(u.network, u.ends): {n for one in passes_of(u) for n in one.inputs()} for u in updates}

    alone = fields(make_config(loss__distribution_matching=0.0))
    assert set(alone) == {("generator", None)}
    assert "prompts" not in alone["generator", None]
    dmd = fields(make_config(loss__consistency=0.0))
    assert set(dmd) == {("fake_score", None), ("generator", None)}, "no warm-up without consistency"
    assert "captions" not in dmd["generator", None]
    both = fields(make_config())
    assert "prompts" not in both["generator", 2]
    assert {"prompts", "captions", "fake_score"} <= both["generator", None]


def test_discrete_consistency_trains_without_tangents():
    config = make_config(loss__consistency=0.0, loss__discrete_consistency=100.0, loss__distribution_matching=0.0)
    states, metrics = run_cycles(config, 2)
    assert changed(*states, "generator")
    assert metrics["generator"][0]["loss/discrete_consistency"] > 0
    assert "consistency/tangent" not in metrics["generator"][0]


def test_bad_values_are_named():
    weights = ("consistency", "discrete_consistency", "distribution_matching")
    with pytest.raises(UserError, match="every term has weight 0"):
        RECIPE.validate_values(make_config(**{f"loss__{name}": 0.0 for name in weights}))
    with pytest.raises(UserError, match=r"config\.rollout\.times='fixed' must be one of random, schedule"):
        RECIPE.validate_values(make_config(rollout__times="fixed"))
    with pytest.raises(UserError, match=r"config\.consistency\.deviation=0\.0 must be positive"):
        RECIPE.validate_values(make_config(consistency__deviation=0.0))
    with pytest.raises(UserError, match=r"config\.init_from"):
        RECIPE.validate(make_config())


@pytest.mark.parametrize("name", ["tiny_rcm", "wan13b_rcm", "wan14b_rcm"])
def test_the_presets_hold(name):
    config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()
    RECIPE.validate_values(config)
    assert set(flatten(config)) == set(RECIPE.fields)
    assert all(field.help for field in RECIPE.fields.values())


def test_a_run_that_stops_in_its_warm_up_ends_with_the_same_bits(tmp_path, monkeypatch):
    use_linear_network(monkeypatch.setattr)
    monkeypatch.setattr(method, "make_mesh", lambda **sizes: make_mesh(**sizes | {"devices": jax.devices()[:1]}))
    inputs = write_inputs(tmp_path)

    def run(folder, *stops):
        for stop in stops:
            outcome = run_method(RECIPE, make_config(**inputs, num_steps=stop), tmp_path / folder)
            assert outcome.status == 0
        lines = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        logged = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
        return jax.tree.map(to_host, outcome.state), logged, outcome.method

    whole, logged, built = run("whole", 3)
    parts, again, _ = run("parts", 1, 3)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert logged == again
    assert "loss/fake_score" not in logged[1]
    assert "loss/fake_score" in logged[2]
    student = built.record()["student"]
    assert student["timesteps"] == [987.7, 933.8, 852.9, 609.0]
    assert student["fewer_steps"]
