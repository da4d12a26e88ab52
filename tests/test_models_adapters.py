"""Adapters on a transformer: nothing changes at first, then what the merged weights would make; gradients, tangents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from training_cases import DIT

from avd_jax.capacity.flops import count_flops
from avd_jax.convert.state import flat_state
from avd_jax.errors import UserError
from avd_jax.models.adapters import TARGETS, Adapters, has_adapters, joined, product
from avd_jax.models.functional import make_denoiser
from avd_jax.models.placement import Placement
from avd_jax.models.wan_dit import WAN_14B, WanDiT

EVERYWHERE = Adapters(4, 8.0, (*TARGETS, "text_embedding_0", "time_projection_1", "patch_embedding", "head.head"))


def network(adapters=EVERYWHERE, dtype="float32", model=DIT, **options):
    return make_denoiser(model, dtype=dtype, param_dtype=dtype, adapters=adapters, **{"remat": "none"} | options)


def base_params(dtype=jnp.float32):
    dit = WanDiT(DIT, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
    return nnx.to_pure_dict(nnx.state(dit))


def inputs(size=2):
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.standard_normal((size, 3, 4, 4, 4)), jnp.float32)
    embeds = jnp.asarray(rng.standard_normal((size, 8, 16)), jnp.float32)
    return latents, jnp.linspace(800.0, 300.0, size), {"prompt_embeds": embeds}


def trained_adapters(adapters=EVERYWHERE):
    """Adapters that are no longer zero."""
    shapes = jax.eval_shape(lambda: network(adapters).new_adapters(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32), shapes)


def merged(adapters, base, scale=EVERYWHERE.scale):
    """The weights that base and adapters come to."""
    flat, found = flat_state(adapters), dict(flat_state(base))
    for path in [path for path in flat if path.endswith(".a")]:
        a, b, kernel = flat[path], flat[path[:-1] + "b"], path.replace("adapter.a", "kernel")
        found[kernel] = found[kernel] + product(a, b, scale=scale, shape=found[kernel].shape)
    leaves, structure = jax.tree_util.tree_flatten_with_path(base)
    paths = [".".join(key.key for key in keys) for keys, _ in leaves]
    return jax.tree.unflatten(structure, [found[path] for path in paths])


def test_new_adapters_change_no_bit():
    base, run = base_params(jnp.bfloat16), network(dtype="bfloat16")
    adapters = jax.jit(lambda: run.new_adapters(3))()
    both = joined(adapters, base)
    assert has_adapters(both)
    assert not has_adapters(base)
    assert both["blocks"]["self_attn"]["q"]["kernel"] is base["blocks"]["self_attn"]["q"]["kernel"]
    run = jax.jit(run)
    np.testing.assert_array_equal(run(both, *inputs()), run(base, *inputs()))
    flat = flat_state(adapters)
    assert all(np.all(leaf == 0) == path.endswith(".b") for path, leaf in flat.items())
    a = np.asarray(flat["blocks.ffn_2.adapter.a"])
    assert a.shape == (2, 40, 4)
    assert np.abs(a).max() <= 40**-0.5
    assert a.std() == pytest.approx(120**-0.5, rel=0.1)
    assert not np.array_equal(a[0], a[1])


def test_trained_adapters_are_what_merged_weights_make():
    """Velocity, gradient and forward tangent are those of the weights that both come to."""
    base, adapters, given = base_params(), trained_adapters(), inputs()
    run = network(placement=Placement(tangents=True))
    # The gradient is of the network as it is trained: nothing goes backwards through the tangents' attention.
    learn = network(remat="block")

    def along(parameters):
        latents, times, conditions = given
        shift = jnp.ones_like(latents), jnp.ones_like(times)
        return jax.jvp(lambda xt, t: run(parameters, xt, t, conditions), (latents, times), shift)

    def loss(adapters, whole):
        return jnp.mean(jnp.square(learn(whole(adapters, base), *given)))

    found, expected = jax.jit(lambda: [along(whole(adapters, base)) for whole in (joined, merged)])()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max())
    found, expected = jax.jit(lambda: [jax.grad(loss)(adapters, whole) for whole in (joined, merged)])()
    for path, wanted in flat_state(expected).items():
        assert np.abs(wanted).max() > 0, path
        np.testing.assert_allclose(flat_state(found)[path], wanted, atol=2e-5 * np.abs(wanted).max(), err_msg=path)


def test_the_base_has_no_gradient_to_pay_for():
    """Of the three products of a matrix in a step, the one for its own gradient is left out."""
    model = dataclasses.replace(DIT, dim=96, ffn_dim=384, num_heads=4)
    run, given = network(Adapters(2, 2.0), model=model), inputs(1)
    whole = run.abstract_params()
    adapters = jax.eval_shape(lambda: run.new_adapters(0))

    def loss(parameters):
        return jnp.mean(run(parameters, *given))

    forward = count_flops(loss, whole)
    full = count_flops(jax.grad(loss), whole)
    cheap = count_flops(jax.grad(lambda adapters, base: loss(joined(adapters, base))), adapters, whole)
    assert cheap < full - 0.6 * forward


def test_the_14b_model_has_307_million_at_rank_64():
    shapes = jax.eval_shape(lambda: network(Adapters(64, 64.0), "bfloat16", WAN_14B).new_adapters(0))
    layer = 8 * (5120 + 5120) + 2 * (5120 + 13824)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 40 * 64 * layer == 306_708_480


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (Adapters(4, 1.0, ("selfattn",)), r"targets: no layer is called 'selfattn' \(did you mean 'self_attn\.\w'\?\)"),
        (
            Adapters(4, 1.0, ("q", "ffn.0")),
            r"no layer is called 'ffn\.0' \(did you mean 'ffn_0'\?\); there are blocks\.",
        ),
        (Adapters(4, 1.0, ()), r"targets=\(\) names no layer; take some of q, k"),
        (Adapters(25, 1.0), r"rank=25 is larger than blocks\.\w+\.\w, a matrix of 24 x 24, has; take 24 at most"),
    ],
)
def test_what_does_not_fit_is_one_line(adapters, message):
    with pytest.raises(UserError, match=message):
        network(adapters)
