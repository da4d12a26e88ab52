"""The linear layer: values and derivatives against einsum, and what is summed in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from avd_jax.models.linear import Linear, Stages, gated_project, project
from avd_jax.models.placement import Placement
from avd_jax.parallel.mesh import make_mesh

EQUATIONS = {
    "bnd,dhk->bhnk": ((2, 5, 6), (6, 3, 4), (3, 4)),
    "bhnk,hkd->bnd": ((2, 3, 5, 4), (3, 4, 6), (6,)),
    "bnd,df->bnf": ((2, 5, 6), (6, 7), (7,)),
    "ad,df->af": ((2, 6), (6, 7), (7,)),
}


def arrays(equation, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in EQUATIONS[equation]]


def plain(equation, x, kernel, bias):
    product = jnp.einsum(equation, x, kernel)
    # The axes of a bias are those of the kernel that stay; heads come before tokens.
    return product + (bias[:, None, :] if equation == "bnd,dhk->bhnk" else bias)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_it_is_einsum_and_a_bias_with_the_same_derivatives(equation):
    given = arrays(equation)
    ours = lambda *given: project(equation, *given, jnp.float32)  # noqa: E731
    same = lambda *given: plain(equation, *given)  # noqa: E731
    np.testing.assert_allclose(ours(*given), same(*given), rtol=1e-5, atol=1e-5)
    slope = np.random.default_rng(1).standard_normal(same(*given).shape, np.float32)
    found, expected = (jax.vjp(function, *given)[1](slope) for function in (ours, same))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
    moved = [leaf + 1 for leaf in given]
    found, expected = (jax.jvp(function, given, moved)[1] for function in (ours, same))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arguments", [(1,), (2,), (0, 2), (0, 1)])
def test_some_of_the_weights_may_be_frozen(arguments):
    given = arrays("bnd,df->bnf")
    gradient = lambda function: jax.grad(lambda *given: jnp.sum(function(*given) ** 2), arguments)(*given)  # noqa: E731
    found = gradient(lambda *given: project("bnd,df->bnf", *given, jnp.float32))
    expected = gradient(lambda *given: plain("bnd,df->bnf", *given))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


def test_gradients_of_weights_are_summed_in_float32_with_half_precision_products():
    rng = np.random.default_rng(0)
    x, slope = (rng.standard_normal((4, 300, 3)).astype(jnp.bfloat16) for _ in range(2))
    kernel, bias = rng.standard_normal((3, 3), np.float32), np.zeros(3, np.float32)
    run = lambda *weights: project("bnd,df->bnf", x, *weights, jnp.bfloat16)  # noqa: E731
    assert run(kernel, bias).dtype == jnp.bfloat16
    kernel_gradient, bias_gradient = jax.vjp(run, kernel, bias)[1](jnp.asarray(slope))
    exact = np.einsum("bnd,bnf->df", x.astype(np.float64), slope.astype(np.float64))
    np.testing.assert_allclose(kernel_gradient, exact, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(bias_gradient, slope.astype(np.float64).sum((0, 1)), rtol=1e-5, atol=1e-4)
    assert kernel_gradient.dtype == bias_gradient.dtype == jnp.float32
    # Rounded once more, each would be off by more than that.
    assert np.abs(exact.astype(jnp.bfloat16).astype(np.float64) - exact).max() > 1e-2


GATED = [equation for equation in EQUATIONS if equation.endswith("bnd")] + ["bnd,df->bnf"]


@pytest.mark.parametrize("equation", GATED)
@pytest.mark.parametrize("arguments", [(0, 1, 2, 3), (0,), (1, 3)])
def test_a_gated_product_has_the_derivatives_of_a_product_and_a_gate(equation, arguments):
    """All of them, as in training, and some: those of a tangent along the input, or of frozen weights."""
    given = [*arrays(equation), np.random.default_rng(1).standard_normal((2, EQUATIONS[equation][2][0]), np.float32)]
    moving = [given[i] for i in arguments]
    found = []
    for function in (
        lambda *given: gated_project(equation, *given, jnp.float32),
        lambda *given: plain(equation, *given[:3]) * given[3][:, None],
    ):

        def of_some(*moving, function=function):
            named = dict(zip(arguments, moving, strict=True))
            return function(*(named.get(i, x) for i, x in enumerate(given)))

        output, back = jax.vjp(of_some, *moving)
        change = jax.jvp(of_some, moving, [leaf + 1 for leaf in moving])[1]
        found.append((output, change, back(output)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *found)


def test_a_gated_products_gradients_are_summed_in_float32_with_half_precision_products():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 300, 3)).astype(jnp.bfloat16)
    kernel, bias = (
        rng.standard_normal((3, 3), np.float32).astype(jnp.bfloat16).astype(np.float32),
        np.ones(3, np.float32),
    )
    gate, slope = rng.standard_normal((2, 3), np.float32), rng.standard_normal((2, 300, 3)).astype(jnp.bfloat16)
    run = lambda *given: gated_project("bnf,fd->bnd", *given, jnp.bfloat16)  # noqa: E731
    output, back = jax.vjp(run, jnp.asarray(x), kernel, bias, gate)
    assert output.dtype == jnp.float32
    x, slope = (leaf.astype(np.float64) for leaf in (x, slope))
    expected = (
        np.einsum("bnf,bnd,bd->fd", x, slope, gate),
        np.einsum("bnd,bd->d", slope, gate),
        np.einsum("bnd,bnd->bd", slope, x @ kernel + bias),
    )
    for one, other in zip(back(jnp.asarray(slope, jnp.float32))[1:], expected, strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-4)


def test_a_gated_products_gradients_share_a_cut_kernel():
    """It is gathered once forwards and once backwards, although two of the gradients read it."""
    mesh = make_mesh(data=1, fsdp=8)

    def cut(shape, *spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    given = cut((8, 4, 16), "fsdp", dtype=jnp.bfloat16), cut((16, 24), None, "fsdp"), cut((24,)), cut((8, 24), "fsdp")
    run = lambda *given: jnp.sum(jnp.sin(gated_project("bnf,fd->bnd", *given, jnp.bfloat16, mesh)))  # noqa: E731
    text = jax.jit(jax.grad(run, argnums=(0, 1, 2, 3))).lower(*given).compile().as_text()
    assert text.count(" all-gather(") == 2


def test_weights_in_half_precision_keep_their_dtype():
    layer = Linear(3, 2, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    gradient = nnx.grad(lambda layer: jnp.sum(layer(jnp.ones((1, 3))).astype(jnp.float32)))(layer)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.bfloat16)}


def test_float32_products_are_asked_to_be_exact():
    text = jax.jit(lambda *given: project("bnd,df->bnf", *given, jnp.float32)).lower(*arrays("bnd,df->bnf")).as_text()
    assert "HIGHEST" in text


STAGED = {  # equation -> shapes of x and kernel, and the axis that the mesh cuts
    "bnd,dhk->bhnk": ((4, 6, 8), (8, 3, 4), -3),
    "bhnk,hkd->bnd": ((4, 3, 6, 4), (3, 4, 8), -1),
    "bnd,df->bnf": ((4, 6, 8), (8, 5), -2),
    "abd,df->abf": ((4, 6, 5), (5, 8), -1),
}


@pytest.mark.parametrize("equation", STAGED)
def test_a_kernels_gradient_in_two_stages(equation, monkeypatch):
    monkeypatch.setattr(Placement, "on_tpu", True)
    x_shape, kernel_shape, cut = STAGED[equation]
    mesh = make_mesh(data=1, fsdp=4, seq=2)
    placement = Placement(mesh=mesh, batch_axes=("data", "fsdp"), sequence_axis="seq")
    stages = Stages.of(placement, 4, 6, kernel_shape, cut)
    rng = np.random.default_rng(0)
    x, kernel = (rng.standard_normal(shape, np.float32) for shape in (x_shape, kernel_shape))
    spec = [None] * kernel.ndim
    spec[cut] = ("fsdp", "seq")
    own = NamedSharding(mesh, PartitionSpec(*spec))
    kernel = jax.device_put(kernel, own)
    tokens = equation.split(",")[0].index("n" if "n" in equation else "b")
    shared = ["fsdp" if axis == 0 else "seq" if axis == tokens else None for axis in range(x.ndim)]
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*shared)))

    def gradient(stages):
        return jax.grad(lambda kernel: jnp.sum(project(equation, x, kernel, None, jnp.float32, stages=stages) ** 2))

    found = jax.jit(gradient(stages))(kernel)
    np.testing.assert_allclose(found, gradient(None)(kernel), rtol=1e-4, atol=1e-4)
    assert found.sharding.is_equivalent_to(own, kernel.ndim)


def test_one_stage_where_two_gain_nothing_or_do_not_divide(monkeypatch):
    def stages(examples=8, tokens=6, kernel=(64, 3, 4), **mesh):
        placement = Placement(mesh=make_mesh(**mesh), batch_axes=("data", "fsdp"), sequence_axis="seq")
        return Stages.of(placement, examples, tokens, kernel, -3)

    assert stages(fsdp=4, seq=2) is None  # on a CPU
    monkeypatch.setattr(Placement, "on_tpu", True)
    assert stages(fsdp=4, seq=2) is not None
    assert stages(fsdp=8) is stages(seq=8) is stages(data=2, fsdp=2, seq=2) is None
    for odd in {"examples": 2}, {"tokens": 5}, {"kernel": (12, 3, 4)}:
        assert stages(fsdp=4, seq=2, **odd) is None
