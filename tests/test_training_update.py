"""What an update follows from: terms and what they share, the fields they read, the trained part of a network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_method

from avd_jax.fields import config_from
from avd_jax.parallel.memory import MEMORIES
from avd_jax.parallel.mesh import make_mesh
from avd_jax.training.assembly import Assembly
from avd_jax.training.method import BatchField, Draw, Frozen, Method, Term, Trained, Update, Value
from avd_jax.training.state import abstract_state, init_state
from avd_jax.training.update import fields_of, make_step, passes_of

NUMBERS = jnp.arange(1.0, 5.0)


def passed(*terms, values=(), watch=()):
    """The names of the terms of each pass, and of what it asks for."""
    update = Update("net", "net", terms=terms, values=values, watch=watch)
    return [([term.name for term in one.terms], sorted(one.inputs())) for one in passes_of(update)]


def term(name, *inputs, weight=1.0):
    return Term(name, weight, inputs, lambda **given: sum(given.values()))


def value(name, *inputs):
    return Value(name, inputs, lambda **given: sum(given.values()))


def test_terms_that_share_a_value_are_one_pass():
    shared = value("shared", "net", "a")
    found = passed(term("one", "shared"), term("two", "shared", "b"), term("three", "net", "c"), values=(shared,))
    assert found == [(["one", "two"], ["a", "b", "net"]), (["three"], ["c", "net"])]


def test_a_term_may_join_two_passes():
    values = (value("x", "net", "a"), value("y", "net", "b"), value("both", "x", "y"))
    found = passed(term("one", "x"), term("two", "y"), term("three", "both"), values=values)
    assert found == [(["one", "two", "three"], ["a", "b", "net"])]


def test_a_term_of_weight_0_asks_for_nothing():
    values = (value("x", "net", "a"),)
    assert passed(term("off", "x", weight=0.0), term("on", "net", "b"), values=values) == [(["on"], ["b", "net"])]
    assert passed(term("off", "x", weight=0.0), values=values) == []


def test_what_is_watched_asks_for_no_pass_of_its_own():
    values, watch = (value("x", "net", "a"),), (value("seen", "x", "w"),)
    assert passed(term("on", "net", "b"), values=values, watch=watch) == [(["on"], ["b", "net"])]
    assert passed(term("on", "x"), values=values, watch=watch) == [(["on"], ["a", "net", "w"])]


def method_of(update, trained=None, frozen=None, accumulation_steps=1):
    net = {"scale": jnp.asarray(2.0)}
    field = BatchField(jax.ShapeDtypeStruct((4,), jnp.float32))
    return Method(
        name="test",
        main="net",
        mesh=make_mesh(devices=jax.devices()[:1]),
        networks={"net": trained or Trained(jax.eval_shape(lambda: net), lambda shardings: net, optax.sgd(0.5))},
        updates=(update,),
        fields={"a": field, "b": field},
        batches=lambda fresh: iter(()),
        frozen=frozen or {},
        accumulation_steps=accumulation_steps,
    )


@pytest.mark.parametrize("parts", [None, 1, 2, 4])
def test_one_update_by_hand(parts):
    """sgd on 3 mean(w (scale a)^2), w = a: the gradient is 6 scale mean(a^3)."""
    size = Value("size", ("net", "a"), lambda net, a: net["scale"] * a)
    square = Term("square", 3.0, ("size",), lambda size: size**2, weighted_by="weight")
    weight = Value("weight", ("a",), lambda a: jax.lax.stop_gradient(a))
    update = Update(
        "total",
        "net",
        (square,),
        (size, weight),
        watch=(Value("seen", ("size",), lambda size: {"half": size / 2}),),
        reports=("weight",),
        draws=(Draw("number", lambda key, extras: jax.random.randint(key, (), 0, 9)),),
        metrics=lambda made, extras: made.values["seen"] | {"weight": made.values["weight"]} | made.draws,
    )
    method = method_of(update, accumulation_steps=parts)
    assert fields_of(method, update) == ("a",)
    state = init_state(method, {"net": {"scale": jnp.asarray(2.0)}})
    after, metrics = jax.jit(make_step(method, update))(state, {}, {"a": NUMBERS}, jax.random.key(3))
    gradient = 6 * 2.0 * np.mean(np.arange(1.0, 5.0) ** 3)
    assert float(after.networks["net"].params["scale"]) == pytest.approx(2 - 0.5 * gradient)
    assert float(metrics["grad_norm/total"]) == pytest.approx(gradient)
    assert float(metrics["loss/total"]) == pytest.approx(3 * np.mean(4 * np.arange(1.0, 5.0) ** 3))
    np.testing.assert_allclose(metrics["half"], NUMBERS)
    np.testing.assert_allclose(metrics["weight"], NUMBERS)
    assert int(metrics["number"]) == int(jax.random.randint(jax.random.key(3), (), 0, 9))
    assert int(after.step) == 1


def test_moments_may_wait_in_the_hosts_memory():
    """They come to the device for the update and go back; what they are does not depend on it."""
    term = Term("size", 1.0, ("net", "a"), lambda net, a: jnp.sum(net["matrix"] ** 2) * a)
    update = Update("total", "net", (term,))
    start, after = {"matrix": jnp.ones((2, 2))}, {}
    for memory in ("device", "host"):
        trained = Trained(
            jax.eval_shape(lambda: start), lambda shardings: start, optax.adam(0.5), optimizer_memory=memory
        )
        assembly = Assembly(method_of(update, trained))
        state = assembly.init_state()
        for key in jax.random.split(jax.random.key(0)):
            state, _ = assembly.calls[0].step(state, {}, {"a": NUMBERS}, key)
        after[memory] = jax.device_get(state)
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.networks["net"].optimizer) if leaf.ndim}
        assert kinds == {MEMORIES[memory]}
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.networks["net"].params)} == {"device"}
    jax.tree.map(np.testing.assert_array_equal, after["host"], after["device"])


def test_an_adapter_is_trained_and_what_it_stands_on_stays():
    """A network is `base + adapter`: gradient, optimizer and state are of the adapter alone."""
    base = {"scale": jnp.asarray(5.0)}
    adapter = {"scale": jnp.zeros(())}
    trained = Trained(
        jax.eval_shape(lambda: adapter),
        lambda shardings: adapter,
        optax.sgd(0.5),
        frozen="base",
        whole=lambda adapter, base: jax.tree.map(jnp.add, adapter, base),
    )
    update = Update("total", "net", (Term("size", 1.0, ("net", "a"), lambda net, a: net["scale"] * a),))
    method = method_of(update, trained, {"base": Frozen(jax.eval_shape(lambda: base), lambda: base)})
    state = init_state(method, {"net": adapter})
    assert [leaf.shape for leaf in jax.tree.leaves(state.networks["net"].params)] == [()]
    after, metrics = jax.jit(make_step(method, update))(state, {"base": base}, {"a": NUMBERS}, jax.random.key(0))
    assert float(metrics["loss/total"]) == 5 * 2.5
    assert float(after.networks["net"].params["scale"]) == -0.5 * 2.5
    # Another update sees the sum of both.
    _, metrics = jax.jit(make_step(method, update))(after, {"base": base}, {"a": NUMBERS}, jax.random.key(0))
    assert float(metrics["loss/total"]) == (5 - 1.25) * 2.5


def test_the_state_follows_from_the_networks():
    method = toy_method.build(config_from(toy_method.FIELDS))
    state = abstract_state(method)
    assert set(state.networks) == {"guess", "line"}
    assert state.extras == {}
    items = state.to_items()
    assert set(items) == {"guess", "line", "guess_ema", "line_ema", "optimizers", "progress"}
    assert jax.tree.leaves(state.from_items(items)) == jax.tree.leaves(state)


def test_extras_of_any_kind_are_saved_and_come_back():
    method = toy_method.build(config_from(toy_method.FIELDS))
    extras = {
        "pair": lambda: (jnp.zeros(3), {"deep": jnp.ones(())}),
        "optimizer": lambda: optax.adam(1.0).init({"x": 1.0}),
    }
    method = dataclasses.replace(method, extras=extras)
    start = {name: network.start(None) for name, network in method.networks.items()}
    state = init_state(method, start)
    back = state.from_items(state.to_items())
    assert jax.tree.structure(back) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, back, state)


def test_networks_that_start_from_the_same_weights_load_them_once():
    method, loads = toy_method.build(config_from(toy_method.FIELDS)), []

    def start(shardings):
        loads.append(1)
        return {"slope": jnp.ones(()), "height": jnp.ones(())}

    line = dataclasses.replace(method.networks["line"], start=start)
    twice = dataclasses.replace(method, networks={"line": line, "guess": line}, updates=method.updates[1:])
    state = Assembly(twice).init_state()
    assert len(loads) == 1
    first, second = (state.networks[name].params["slope"] for name in ("line", "guess"))
    first, second = (array.addressable_data(0).unsafe_buffer_pointer() for array in (first, second))
    assert first != second, "an update reuses its own memory only"
