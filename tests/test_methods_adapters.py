"""Distillations that train adapters: what they hold, save and resume, and how a run of one is read."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from convert_cases import write_all
from flax import nnx
from jax.sharding import NamedSharding
from training_cases import DIT, make_config, run_method, use_devices, write_inputs, write_weights

from avd_jax import convert
from avd_jax.capacity.program import expected_flops
from avd_jax.convert.adapted import with_adapters
from avd_jax.convert.architectures import WAN_DIT
from avd_jax.convert.state import flat_state
from avd_jax.convert.weights import open_weights
from avd_jax.errors import UserError
from avd_jax.fields import config_from
from avd_jax.methods import avd, distillation, rcm
from avd_jax.methods.observer import DistillationObserver
from avd_jax.models.adapters import product
from avd_jax.parallel.mesh import make_mesh
from avd_jax.parallel.rules import spec_for
from avd_jax.training.assembly import Assembly

# One network and one pass: the least that a run of AVD compiles.
REGRESSION = {"loss__distribution_matching": 0.0, "loss__temporal": 0.0, "student__timesteps": (1000.0, 500.0)}
RUN = {
    **{"num_steps": 2, "batch_size": 2, "sample_every": 0, "checkpoint_every": 1, "ema_decay": 0.5},
    **{"lora__rank": 4, "lora__targets": ("self_attn.q", "o", "ffn_2"), "optimizer__learning_rate": 1e-2},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """A run that was never stopped, its settings, and its last state."""
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch.setattr, 1)
        workdir, settings = tmp_path_factory.mktemp("run"), {**inputs, **REGRESSION, **RUN}
        outcome = run_method(avd.RECIPE, make_config(**settings), workdir)
        yield SimpleNamespace(workdir=workdir, settings=settings, base=inputs["init_from"], state=outcome.state)


def saved(workdir, step):
    folder, found = workdir / "checkpoints" / str(step), {}
    for item in (child for child in folder.iterdir() if (child / "_METADATA").is_file()):
        for keys, leaf in jax.tree_util.tree_leaves_with_path(ocp.StandardCheckpointer().restore(item)):
            found[f"{item.name}{jax.tree_util.keystr(keys)}"] = np.asarray(leaf)
    return found


def test_a_run_saves_adapters_alone_and_is_resumed_bit_for_bit(run, tmp_path):
    for steps in (1, 2):
        resumed = make_config(**run.settings | {"num_steps": steps})
        assert run_method(avd.RECIPE, resumed, tmp_path / "resumed").status == 0
    found, expected = saved(tmp_path / "resumed", 2), saved(run.workdir, 2)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name].tobytes() != expected[name].tobytes()] == []
    assert not any("kernel" in name or "bias" in name for name in found)
    each = DIT.num_layers * 4 * (3 * 2 * 24 + 40 + 24)
    items = [name.split("[")[0] for name in found]
    sizes = {item: sum(a.size for name, a in found.items() if name.startswith(f"{item}[")) for item in set(items)}
    assert sizes["generator"] == sizes["generator_ema"] == each
    assert 2 * each <= sizes["optimizers"] <= 2 * each + 4

    other = make_config(**run.settings | {"lora__rank": 2})
    with pytest.raises(UserError, match=r"a run with other settings \(config\.lora\.rank was 4, is 2\)"):
        run_method(avd.RECIPE, other, tmp_path / "resumed")


@pytest.mark.parametrize("key", ["generator", "ema"])
def test_a_run_reads_as_base_and_adapters_together(run, key):
    base = flat_state(nnx.state(convert.load_dit(run.base)))
    trained = flat_state(
        {"generator": run.state.networks["generator"].params, "ema": run.state.networks["generator"].ema}[key]
    )
    dit = convert.load_dit(run.workdir, key=key)
    changed = 0
    for path, leaf in flat_state(nnx.state(dit)).items():
        expected, name = np.asarray(base[path]), path.removesuffix("kernel") + "adapter."
        if f"{name}a" in trained:
            changed += 1
            a, b = (np.asarray(trained[name + part]) for part in "ab")
            assert np.abs(b).max() > 0
            expected = expected + product(a, b, scale=8.0, shape=expected.shape)
        np.testing.assert_allclose(leaf, expected, rtol=1e-6, atol=1e-6)
    assert changed == 4
    mesh = make_mesh(fsdp=2, devices=jax.devices()[:2])
    cut = convert.load_dit(
        run.workdir, key=key, sharding=lambda path, shape: NamedSharding(mesh, spec_for(path, shape, mesh))
    )
    for path, leaf in flat_state(nnx.state(cut)).items():
        np.testing.assert_allclose(leaf, flat_state(nnx.state(dit))[path], rtol=1e-6, atol=1e-6)


def test_the_base_may_move_but_not_be_another(run, tmp_path):
    moved = shutil.copytree(run.workdir, tmp_path / "run")
    step = moved / "checkpoints" / "2"
    gone = tmp_path / "gone"
    meta = json.loads((step / "meta" / "metadata").read_text())
    assert meta["base"] == {"path": run.base, "which": ""}
    meta["base"]["path"] = str(gone)
    (step / "meta" / "metadata").write_text(json.dumps(meta))
    with pytest.raises(
        UserError, match=rf"has adapters over the weights {gone}, which are not there; .* link {moved}/base"
    ):
        convert.load_dit(moved)
    write_weights(gone, seed=5)
    with pytest.raises(UserError, match=rf"{moved}: has adapters over other weights than those in {gone}; link"):
        convert.load_dit(moved)
    (moved / "base").symlink_to(run.base)
    found, expected = (flat_state(nnx.state(convert.load_dit(path))) for path in (moved, run.workdir))
    assert all(np.array_equal(found[path], expected[path]) for path in expected)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"init_from": "gone too"}))
    convert.export_lora(moved, tmp_path / "lora", rank=2, style="comfyui")  # its teacher is the base
    card = (tmp_path / "lora" / "README.md").read_text()
    assert (card.count('"lora.rank": 4'), str(gone) in card) == (1, False)
    for damage in ({"base": None}, {"inputs": {}}, {"architecture": meta["architecture"] | {"adapters": {"rank": 4}}}):
        (step / "meta" / "metadata").write_text(json.dumps(meta | damage))
        with pytest.raises(UserError, match="metadata: does not say over which weights its adapters are"):
            convert.load_dit(moved)


def test_style_adapters_are_part_of_the_base(run, tmp_path):
    """As `init_lora` merges them, here written into a run's record afterwards; and such a run is a LoRA itself."""
    moved = shutil.copytree(run.workdir, tmp_path / "run")
    file = moved / "checkpoints" / "2" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    change = np.full((24,), 0.25, np.float32)
    write_all(tmp_path, {"diffusion_model.blocks.0.self_attn.v.diff_b": change}, stem="style")
    lora = f"{tmp_path}/style.safetensors:2"
    config = make_config(**run.settings | {"init_lora": lora})
    meta["base"] = distillation.record(config, DIT, None)["base"]
    assert meta["base"] == {"path": run.base, "which": "", "lora": lora}
    file.write_text(json.dumps(meta))
    with pytest.raises(UserError, match="was trained over other contents of"):
        convert.load_dit(moved)
    (adapter,) = with_adapters(open_weights(run.base, WAN_DIT), lora).adapters
    meta["inputs"]["init_lora"] = adapter.fingerprint
    file.write_text(json.dumps(meta))
    plain, styled = (flat_state(nnx.state(convert.load_dit(path))) for path in (run.workdir, moved))
    for path, array in plain.items():
        expected = 0.5 if path == "blocks.self_attn.v.bias" else 0.0
        np.testing.assert_allclose((styled[path] - array)[:1], expected, atol=1e-6, err_msg=path)

    convert.export_lora(moved, tmp_path / "lora", rank=0, style="comfyui", dtype=np.float32, teacher=run.base)
    merged = flat_state(nnx.state(convert.load_dit(run.base, lora=str(tmp_path / "lora"))))
    for path, array in styled.items():
        np.testing.assert_allclose(merged[path], array, atol=1e-5, err_msg=path)


def assembly(recipe, inputs, **fields):
    config = config_from(recipe.fields)
    settings = {"batch_size": 2, "compute_dtype": "float32", "teacher_dtype": "float32", "lora__rank": 4}
    for name, value in (settings | inputs | fields).items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    return Assembly(recipe.build(config, devices=jax.devices()[:1]))


def test_both_networks_stand_on_the_teacher(inputs):
    found = assembly(avd.RECIPE, inputs)
    parts = {part.name: part.device_gib for part in found.parts()}
    assert parts["generator"] == parts["fake_score"] < 0.5 * parts["teacher"]
    one = assembly(avd.RECIPE, inputs, lora__networks="generator")
    parts = {part.name: part.device_gib for part in one.parts()}
    assert parts["generator"] < 0.5 * parts["teacher"] == pytest.approx(0.5 * parts["fake_score"])


def test_rcm_trains_and_samples_them(inputs):
    """By shapes alone; its tangents go through adapters too."""
    found = assembly(rcm.RECIPE, inputs)
    for name in ("generator_step", "student_sample"):
        program = found.program(name)
        assert expected_flops(program) > 0
    whole = program.args[0]
    assert set(whole["blocks"]["ffn_0"]) == {"kernel", "bias", "adapter"}
    assert program.resident == (0,)


def test_samples_are_of_base_and_adapters(inputs):
    generator = assembly(avd.RECIPE, inputs).method.networks["generator"]
    observer, seen = object.__new__(DistillationObserver), []
    observer._generator, observer._frozen = generator, {"teacher": {"blocks": {"q": {"kernel": 1}}, "head": 2}}
    observer._samples = SimpleNamespace(write=lambda step, params: seen.append((step, params)))
    latest = {"blocks": {"q": {"adapter": {"a": 3, "b": 4}}}}
    observer.sample(7, SimpleNamespace(networks={"generator": SimpleNamespace(latest=latest)}))
    assert seen == [(7, {"blocks": {"q": {"kernel": 1, "adapter": {"a": 3, "b": 4}}}, "head": 2})]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora__rank": 99}, r"config\.lora\.rank=99 is larger than blocks\."),
        ({"lora__targets": ("qq",)}, r"config\.lora\.targets: no layer is called 'qq'"),
        ({"lora__alpha": 0.0}, r"config\.lora\.alpha=0\.0 must be positive"),
        ({"lora__networks": "student"}, r"config\.lora\.networks='student' must be one of both, generator"),
    ],
)
def test_what_is_wrong_is_one_line(inputs, fields, message):
    config = make_config(**inputs, **{"lora__rank": 4} | fields)

    def build():
        avd.RECIPE.validate(config)
        avd.RECIPE.build(config, devices=jax.devices()[:1])

    with pytest.raises(UserError, match=message):
        build()
