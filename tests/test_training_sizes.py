"""A run on sets of two sizes: one program a size, exact resume, memory and cost of the largest, bad input."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from training_cases import make_config, train, use_devices, use_linear_network, write_inputs, write_sets

from avd_jax.errors import UserError
from avd_jax.fields import config_from
from avd_jax.methods.avd import RECIPE
from avd_jax.methods.flow_matching import RECIPE as FLOW_MATCHING
from avd_jax.methods.interpolator import RECIPE as INTERPOLATOR
from avd_jax.training.assembly import Assembly
from avd_jax.training.cost import cycle_cost

WIDE = 3, 4, 8, 4


@pytest.fixture(autouse=True, scope="module")
def linear():
    with pytest.MonkeyPatch.context() as patch:
        use_linear_network(patch.setattr)
        use_devices(patch.setattr, 1)
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Sets of two sizes, three examples of the smaller for one of the wider."""
    folder = tmp_path_factory.mktemp("inputs")
    wide, _ = write_sets(folder / "wide", shape=WIDE)
    found = write_inputs(folder)
    found["data__latents"] += f":3,{wide}:1"
    return found


def settings(inputs, **fields):
    base = {"batch_size": 2, "num_steps": 4, "fake_score_updates": 1, "checkpoint_every": 2, "sample_every": 0}
    return make_config(**inputs | base | {"seed": 2, "optimizer__learning_rate": 1e-3} | fields)


def parameters(workdir, step):
    tree = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / "generator")
    return jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), tree)


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss/generator"] for line in lines if "loss/generator" in line]


def test_a_run_on_two_sizes_compiles_each_once_and_resumes_bit_for_bit(inputs, tmp_path, monkeypatch, capsys):
    shapes, compiled, original = [], [], Assembly.dispatch

    def dispatch(self, state, frozen, batch, key, cycle):
        shapes.append((batch["latents"].shape[1:], self.size_of(batch)))
        found = original(self, state, frozen, batch, key, cycle)
        compiled.append([call.step._cache_size() for call in self.calls])
        return found

    monkeypatch.setattr(Assembly, "dispatch", dispatch)
    assert train(settings(inputs), tmp_path / "straight") == 0
    seen = list(shapes)
    assert set(seen) == {((3, 4, 4, 4), "3x4x4"), (WIDE, "3x4x8")}
    assert compiled[-1] == [2, 2], "one program a size and update, not more"
    out = capsys.readouterr().out
    assert "3x4x4: one cycle" in out
    assert "3x4x8: one cycle" in out

    shapes.clear()
    for steps in (2, 4):
        assert train(settings(inputs, num_steps=steps), tmp_path / "resumed") == 0
    assert shapes == seen
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    assert parameters(tmp_path / "resumed", 4) == parameters(tmp_path / "straight", 4)

    with pytest.raises(UserError, match=r"other contents of config.data.latents; .* with the same weights"):
        train(settings(inputs | {"data__latents": inputs["data__latents"].replace(":3", ":2")}), tmp_path / "resumed")


def test_memory_and_cost_are_those_of_the_largest(inputs):
    """Whichever set is named first; samples have the size of that one."""
    small, wide = (path.rpartition(":")[0] for path in inputs["data__latents"].split(","))
    for named in (f"{small},{wide}", f"{wide},{small}"):
        method = RECIPE.build(settings(inputs | {"data__latents": named}))
        assembly = Assembly(method)
        assert next(iter(assembly.sizes)) == ("3x4x4" if named.startswith(f"{small},") else "3x4x8")
        assert assembly.largest == "3x4x8"
        batch = assembly.program("generator_step").args[2]
        assert batch["latents"].shape == (2, *WIDE)
        assert assembly.program("generator_step", "3x4x4").args[2]["latents"].shape == (2, 3, 4, 4, 4)
        assert assembly.program("vae_encode").args[1].shape == (1, 9, 32, 64, 3)
        costs = {size: cycle_cost(assembly, size) for size in assembly.sizes}
        assert costs["3x4x8"].flops == cycle_cost(assembly).flops == pytest.approx(2 * costs["3x4x4"].flops, rel=0.01)
        units = [cost.in_units(cost.flops) for cost in costs.values()]
        assert units[0] == pytest.approx(units[1], rel=0.01), "in forward passes of its size"


def test_other_methods_take_several_sets_too(inputs):
    for recipe in (FLOW_MATCHING, INTERPOLATOR):
        config = recipe_config(recipe, inputs)
        method = recipe.build(config, devices=jax.devices()[:1])
        batch = next(method.batches({}))
        assert Assembly(method).size_of(batch) in ("3x4x4", "3x4x8")


def recipe_config(recipe, inputs):
    config = config_from(recipe.fields)
    config.data.latents, config.batch_size = inputs["data__latents"], 2
    if "held_out" in config.data:
        config.data.held_out = 2
    return config


def test_a_size_that_the_model_cannot_take_is_named(inputs, tmp_path):
    odd, _ = write_sets(tmp_path, shape=(3, 4, 5, 4))
    with pytest.raises(UserError, match=rf"config.data.latents={odd}: the model's patch .* does not divide"):
        RECIPE.build(settings(inputs | {"data__latents": f"{inputs['data__latents']},{odd}:1"}))
    with pytest.raises(UserError, match=r"config.data.latents='a:x,b:1' cannot be used: a:x: the weight 'x'"):
        RECIPE.validate(settings(inputs | {"data__latents": "a:x,b:1"}))
