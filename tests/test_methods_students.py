"""The losses of a batch against NumPy, from what the networks were seen to be given and to answer."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import (
    LATENTS_SHAPE,
    generator_loss,
    linear_network,
    linear_params,
    make_batch,
    make_config,
    make_frozen,
    make_student,
    recording,
)

from avd_jax.losses.adaptive_regression import LossHistory
from avd_jax.methods import students
from avd_jax.methods.avd.terms import fake_score_update
from avd_jax.training.update import example_keys, passes_of

GENERATOR, FAKE_SCORE, TEACHER = linear_params(0), linear_params(1), linear_params(2)
NEGATIVE = np.random.default_rng(7).standard_normal((8, 16)).astype(np.float32)
FROZEN = make_frozen(TEACHER, NEGATIVE)
HISTORY = LossHistory(mean=jnp.asarray([1.0, 5.0, 0.0, 3.0]), seen=jnp.asarray([True, True, False, True]))
TIMES = (1000.0, 900.0, 757.0, 522.0)
BATCH = make_batch(3)
PROMPTS, CAPTIONS = BATCH["prompts"]["prompt_embeds"], BATCH["captions"]["prompt_embeds"]
ALL = {"loss__temporal_clip": -np.inf}


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def keys(seed=0, size=3):
    return example_keys(jax.random.key(seed), jnp.arange(size))


COMPILED = {}


def evaluate(config, *, stop=2, batch=BATCH, seed=0):
    """Return (loss, parts, gradient, calls) of the generator."""
    if str(config) not in COMPILED:
        COMPILED[str(config)] = compiled(config)
    compute, calls = COMPILED[str(config)]
    calls.clear()
    (loss, parts), gradient = compute(GENERATOR, jnp.asarray(stop), keys(seed, len(batch["latents"])), batch)
    jax.effects_barrier()
    return float(loss), jax.tree.map(np.asarray, parts), jax.tree.map(np.asarray, gradient), list(calls)


def compiled(config):
    calls = []
    student = make_student(config, recording(linear_network, calls, "student"))
    teacher = recording(linear_network, calls, "teacher")

    @jax.jit
    def compute(params, stop, keys, batch):
        def loss(params):
            return generator_loss(config, student, teacher, params, FAKE_SCORE, FROZEN, HISTORY, batch, keys, stop)

        return jax.value_and_grad(loss, has_aux=True)(params)

    return compute, calls


def sort_calls(calls):
    """Return (rollout by timestep, fake_score's call, teacher's calls, regression's call or None)."""
    student = [call for call in calls if call[0] == "student" and same(call[1], GENERATOR)]
    fake = [call for call in calls if call[0] == "student" and same(call[1], FAKE_SCORE)]
    teacher = [call for call in calls if call[0] == "teacher"]
    rollout = [call for call in student if same(call[4], PROMPTS)]
    regression = [call for call in student if same(call[4], CAPTIONS)]
    assert len(rollout) + len(regression) + len(fake) + len(teacher) == len(calls)
    return sorted(rollout, key=lambda call: -call[3][0]), fake, teacher, regression


def over(sigmas):
    return np.asarray(sigmas, np.float64)[:, None, None, None, None]


def x0_of(call):
    _, _, latents, timesteps, _, velocity = call
    return latents.astype(np.float64) - over(timesteps / 1000) * velocity


def noise_between(x0, xt, timesteps):
    sigmas = over(timesteps / 1000)
    return (xt - (1 - sigmas) * x0) / sigmas


def looks_like_noise(noise):
    return abs(noise.mean()) < 0.3 and 0.7 < noise.std() < 1.3


@pytest.mark.parametrize("stop", range(4))
def test_the_rollout_renoises_each_prediction_to_the_next_timestep(stop):
    rollout, *_ = sort_calls(evaluate(make_config(**ALL), stop=stop)[3])
    assert [set(call[3]) for call in rollout] == [{np.float32(t)} for t in TIMES[: stop + 1]]
    noises = [rollout[0][2]] + [
        noise_between(x0_of(before), after[2], after[3]) for before, after in itertools.pairwise(rollout)
    ]
    assert all(looks_like_noise(noise) for noise in noises)
    flat = np.stack([noise.ravel() for noise in noises])
    correlation = np.atleast_2d(np.corrcoef(flat)) - np.eye(len(noises))
    assert np.abs(correlation).max() < 0.35, "each step's noise is its own"


def expected_parts(config, calls):
    rollout, (fake,), teacher, (regression,) = sort_calls(calls)
    x0 = x0_of(rollout[-1])
    cond, uncond = teacher if same(teacher[0][4], PROMPTS) else teacher[::-1]
    assert same(cond[4], PROMPTS)
    assert all(np.array_equal(row, NEGATIVE) for row in uncond[4])
    assert same(cond[1:2] + cond[2:4], uncond[1:2] + uncond[2:4])
    assert same(cond[2:5], fake[2:5])
    assert same(cond[1], TEACHER)
    assert ((cond[3] >= 20) & (cond[3] <= 980)).all()
    assert len(set(cond[3])) == 3, "each example has a timestep of its own"
    assert looks_like_noise(noise_between(x0, cond[2], cond[3]))

    real = x0_of(uncond) + config.guidance_scale * (x0_of(cond) - x0_of(uncond))
    axes = (1, 2, 3, 4)
    gradient = (x0_of(fake) - real) / np.abs(x0 - real).mean(axes, keepdims=True)
    distribution = 0.5 * (gradient**2).mean(axes)
    temporal = -np.log(x0.var(axis=1).mean() + 1e-6)

    latents = np.asarray(BATCH["latents"], np.float64)
    index = np.asarray([TIMES.index(t) for t in regression[3]])
    noise = noise_between(latents, regression[2], regression[3])
    assert looks_like_noise(noise)
    losses = ((regression[5] - (noise - latents)) ** 2).mean(axes)
    mean = np.where(np.asarray(HISTORY.seen)[index], np.asarray(HISTORY.mean)[index], losses)
    weight = 1 - 1 / (1 + np.exp(-3.0 * (losses - mean)))
    return {
        "x0_gradient": gradient,
        "distribution_matching": distribution,
        "temporal": temporal,
        "regression": losses,
        "regression_weight": weight,
        "timestep_index": index,
        "made/latent_temporal_variance": x0.var(axis=1).mean((1, 2, 3)),
        "real/latent_temporal_variance": latents.var(axis=1).mean((1, 2, 3)),
        "made/latent_spread": x0.std(axis=(2, 3)).mean((1, 2)),
        "real/latent_spread": latents.std(axis=(2, 3)).mean((1, 2)),
        "rollout": rollout,
        "regression_call": regression,
        "target": noise - latents,
    }


@pytest.mark.parametrize(("seed", "stop"), [(0, 2), (1, 0), (2, 3)])
def test_total(seed, stop):
    config = make_config(guidance_scale=4.0)
    loss, parts, _, calls = evaluate(config, seed=seed, stop=stop)
    expected = expected_parts(config, calls)
    for name, value in parts.items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=1e-6, err_msg=name)
    total = (
        expected["distribution_matching"].mean()
        + 2.0 * (expected["regression_weight"] * expected["regression"]).mean()
        + 0.05 * expected["temporal"]
    )
    assert loss == pytest.approx(total, rel=2e-5)


def by_parameters(call, by_velocity):
    """The gradient by a linear network's parameters, from that by its velocity."""
    _, _, latents, timesteps, embeds, _ = call
    sigmas, text = over(timesteps / 1000), over(embeds.mean((1, 2)))
    return {
        "mix": np.einsum("bfhwc,bfhwd->cd", (1 + sigmas) * latents, by_velocity),
        "time": (sigmas * by_velocity).sum((0, 1, 2, 3)),
        "text": (text * by_velocity).sum((0, 1, 2, 3)),
    }


@pytest.mark.parametrize("stop", [0, 3])
def test_gradient_flows_through_the_last_step_and_the_regression_only(stop):
    """By hand, for the linear network: every input of a call is a constant, and so are the weight and the scores."""
    config = make_config(**ALL)
    _, _, gradient, calls = evaluate(config, stop=stop)
    parts = expected_parts(config, calls)
    last = parts["rollout"][-1]
    x0, size = x0_of(last), np.prod(LATENTS_SHAPE)
    by_x0 = parts["x0_gradient"] / size / 3
    variance = x0.var(axis=1).mean()
    by_x0 += 0.05 * -1 / (variance + 1e-6) * 2 * (x0 - x0.mean(axis=1, keepdims=True)) / x0.size
    by_velocity = -over(last[3] / 1000) * by_x0
    call = parts["regression_call"]
    by_regression = 2.0 * over(parts["regression_weight"]) / 3 * 2 * (call[5] - parts["target"]) / size
    for name, value in by_parameters(last, by_velocity).items():
        expected = value + by_parameters(call, by_regression)[name]
        np.testing.assert_allclose(gradient[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_temporal_gradient_is_truncated():
    open_, shut = (
        evaluate(make_config(loss__distribution_matching=0.0, loss__regression=0.0, loss__temporal_clip=clip))
        for clip in (-10.0, 10.0)
    )
    assert open_[0] == shut[0] == pytest.approx(0.05 * open_[1]["temporal"])
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(open_[2]) if leaf.ndim == 2)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(shut[2]))


@pytest.mark.parametrize(
    ("off", "missing"),
    [
        ("distribution_matching", ("fake", "teacher")),
        ("temporal", ()),
        ("regression", ("regression",)),
    ],
)
def test_a_term_of_weight_0_is_not_computed_and_leaves_the_rest_as_it_was(off, missing):
    full = evaluate(make_config(**ALL))
    loss, parts, _, calls = evaluate(make_config(**ALL, **{f"loss__{off}": 0.0}))
    rollout, fake, teacher, regression = sort_calls(calls)
    counts = {"rollout": len(rollout), "fake": len(fake), "teacher": len(teacher), "regression": len(regression)}
    assert counts == {"rollout": 3, "fake": 1, "teacher": 2, "regression": 1} | dict.fromkeys(missing, 0)
    assert (parts[off] == 0).all()
    weight = {"distribution_matching": 1.0, "temporal": 0.05, "regression": 2.0}[off]
    value = full[1][off] * (full[1]["regression_weight"] if off == "regression" else 1)
    assert loss == pytest.approx(full[0] - weight * value.mean(), rel=1e-5)


def test_regression_alone_runs_no_rollout():
    *_, calls = evaluate(make_config(loss__distribution_matching=0.0, loss__temporal=0.0))
    assert [len(group) for group in sort_calls(calls)] == [0, 0, 0, 1]


def test_fixed_weighting():
    loss, parts, *_ = evaluate(make_config(**ALL, loss__regression_weighting="fixed"))
    assert (parts["regression_weight"] == 1).all()
    rest = parts["distribution_matching"].mean() + 0.05 * parts["temporal"]
    assert loss == pytest.approx(rest + 2 * parts["regression"].mean(), rel=1e-5)


def test_the_authors_weight_uses_the_mean_after_the_update():
    """Which amounts to a k of 0.95 times 3."""
    before, after, smaller_k = (
        evaluate(make_config(**fields))[1]["regression_weight"]
        for fields in ({}, {"loss__adaptive_uses": "after"}, {"loss__adaptive_k": 2.85})
    )
    np.testing.assert_allclose(after, smaller_k, rtol=1e-5)
    assert np.abs(before - after).max() > 1e-4


def test_the_constants_of_the_generators_loss():
    config, stop = make_config(**ALL), jnp.asarray(1)
    student = make_student(config)

    def loss(fake_score, teacher, mean):
        frozen, history = make_frozen(teacher, NEGATIVE), LossHistory(mean, HISTORY.seen)
        args = config, student, linear_network, GENERATOR, fake_score, frozen, history, BATCH, keys(), stop
        return generator_loss(*args)[0]

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(FAKE_SCORE, TEACHER, HISTORY.mean)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("stop", [0, 2])
def test_fake_scores_loss(stop):
    config, calls = make_config(), []
    student = make_student(config, recording(linear_network, calls, "student"))
    (one,) = passes_of(fake_score_update(config, student))

    @jax.jit
    def compute(params, generator):
        def loss(params, generator):
            given = {"fake_score": params, "generator": generator, "keys": keys(), "stop": jnp.asarray(stop)}
            return one.loss(given | BATCH)[0]

        return jax.value_and_grad(loss, argnums=(0, 1))(params, generator)

    loss, (gradient, none) = compute(FAKE_SCORE, GENERATOR)
    jax.effects_barrier()
    rollout, (fake,), teacher, _ = sort_calls(calls)
    assert [call[3][0] for call in rollout] == list(TIMES[: stop + 1])
    assert not teacher
    noise = noise_between(x0_of(rollout[-1]), fake[2], fake[3])
    assert looks_like_noise(noise)
    error = fake[5] - (noise - x0_of(rollout[-1]))
    assert float(loss) == pytest.approx((error**2).mean(), rel=1e-5)
    for name, value in by_parameters(fake, 2 * error / error.size).items():
        np.testing.assert_allclose(gradient[name], value, rtol=1e-4, atol=1e-5)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(none)), "the generator gets no gradient from it"


def test_an_example_does_not_depend_on_its_batch():
    config = make_config(loss__temporal=0.0)
    whole = evaluate(config)[1]
    first = evaluate(config, batch=jax.tree.map(lambda x: x[:2], BATCH))[1]
    for name in ("distribution_matching", "regression", "regression_weight", "timestep_index"):
        np.testing.assert_allclose(first[name], whole[name][:2], rtol=1e-5)


def test_random_choices_cover_what_they_may_be_and_are_independent():
    config = make_config()
    many = jax.vmap(jax.random.key)(jnp.arange(400))
    stops = np.asarray(jax.vmap(lambda key: make_student(config).stop_step(key))(many))
    assert set(stops) == {0, 1, 2, 3}
    assert np.bincount(stops).min() > 60
    # The stop of a batch is no function of what any of its examples draws from.
    examples = jax.vmap(lambda key: example_keys(key, jnp.arange(8)))(many[:20])
    parents = jax.vmap(lambda key: jax.random.fold_in(key, students.STOP))(many[:20])
    taken = {tuple(row) for row in np.asarray(jax.random.key_data(examples)).reshape(-1, 2).tolist()}
    assert not taken & {tuple(row) for row in np.asarray(jax.random.key_data(parents)).tolist()}


def test_regression_timesteps_are_the_students():
    index = np.concatenate(
        [
            evaluate(make_config(loss__distribution_matching=0.0, loss__temporal=0.0), seed=s)[1]["timestep_index"]
            for s in range(3)
        ]
    )
    assert set(index) <= {0, 1, 2, 3}
    assert len(set(index)) > 1
