"""The interpolator's weights in every place: AVD checkpoints, exports, runs, own folders; and if there are none."""

import json
import re
import shutil

import convert_cases as cases
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from avd_jax import convert
from avd_jax.convert.architectures import INTERPOLATOR
from avd_jax.convert.exports import write_interpolator
from avd_jax.convert.interpolator_rules import PREFIX
from avd_jax.convert.shipping import write_interpolator as ship
from avd_jax.convert.weights import open_weights
from avd_jax.errors import UserError
from avd_jax.models.interpolator import Interpolator, InterpolatorConfig

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def tensors():
    """Weights under the authors' keys, with the counters that PyTorch adds."""
    with np.load(cases.FIXTURES / "interpolator_golden.npz") as file:
        return {key: file[key] for key in file.files if key.startswith(PREFIX)}


@pytest.fixture(scope="module")
def file(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("file")
    cases.write_all(folder, tensors)
    return folder / FILE


@pytest.fixture(scope="module")
def expected(file):
    return cases.leaves_of(convert.load_interpolator(file))


def with_student(tensors, folder):
    """Write a file as AVD has them: the transformer under `model.`, the interpolator within."""
    native = cases.read_all(cases.NATIVE / cases.WEIGHTS)
    cases.write_all(folder, {f"model.{key}": value for key, value in native.items()} | tensors)
    return folder / FILE


def trained(folder, items, **meta):
    """Write a checkpoint of step 7."""
    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        saved = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        manager.save(7, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **saved))
        manager.wait_until_finished()
    return folder


def lay_out(layout, file, tensors, tmp_path):
    weights = open_weights(file, INTERPOLATOR)
    if layout == "within a student":
        return with_student(tensors, tmp_path)
    if layout == "bare keys":
        cases.write_all(tmp_path, {key.removeprefix(PREFIX): array for key, array in tensors.items()})
        return tmp_path / FILE
    if layout == "module's keys":
        cases.write_all(tmp_path, {key.removeprefix("model.interp."): array for key, array in tensors.items()})
        return tmp_path / FILE
    if layout == "folder":
        write_interpolator(weights, tmp_path / "interpolator")
    if layout == "the folder itself":
        write_interpolator(weights, tmp_path / "interpolator")
        return tmp_path / "interpolator"
    if layout == "shipped":
        ship(convert.load_interpolator(file), tmp_path)
    if layout == "orbax":
        convert.save_orbax(weights, tmp_path / "interpolator")
    if layout == "native export":
        student = with_student(tensors, tmp_path / "student")
        (tmp_path / "student" / "config.json").write_text((cases.NATIVE / "config.json").read_text())
        convert.export_dit(student, tmp_path / "out", layout="native")
        return tmp_path / "out"
    if layout == "diffusers export":
        student = with_student(tensors, tmp_path / "student")
        (tmp_path / "student" / "config.json").write_text((cases.NATIVE / "config.json").read_text())
        convert.export_dit(student, tmp_path / "out", layout="diffusers")
        return tmp_path / "out"
    if layout == "student's run":
        cases.training_run(tmp_path, steps=(10,))
        convert.save_orbax(weights, tmp_path / "interpolator")
    if layout == "a step of a student's run":
        cases.training_run(tmp_path, steps=(10,))
        convert.save_orbax(weights, tmp_path / "interpolator")
        return tmp_path / "checkpoints" / "10"
    if layout in ("own run", "own run, EMA", "own run of before"):
        own = nnx.to_pure_dict(nnx.state(convert.load_interpolator(file)))
        other = jax.tree.map(lambda leaf: leaf + 1, own)
        record = INTERPOLATOR.record(weights.config)
        if layout == "own run of before":
            trained(tmp_path, {"generator": own, "ema": other}, architecture=record)
        else:
            main, ema = (own, other) if layout == "own run" else (other, own)
            trained(tmp_path, {"interpolator": main, "interpolator_ema": ema}, architecture=record, main="interpolator")
    return tmp_path


@pytest.mark.parametrize(
    "layout",
    [
        *("within a student", "bare keys", "module's keys", "folder", "the folder itself", "shipped", "orbax"),
        *("native export", "diffusers export", "student's run", "a step of a student's run"),
        *("own run", "own run, EMA", "own run of before"),
    ],
)
def test_every_layout_gives_the_same_weights(layout, file, tensors, expected, tmp_path):
    path = lay_out(layout, file, tensors, tmp_path)
    key = "ema" if layout.endswith("EMA") else "generator"
    actual = cases.leaves_of(convert.load_interpolator(path, key=key))
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def test_exports_hold_the_authors_keys_and_the_transformer_alone_is_still_found(tensors, tmp_path):
    student = with_student(tensors, tmp_path / "student")
    (tmp_path / "student" / "config.json").write_text((cases.NATIVE / "config.json").read_text())
    weights = {key: array for key, array in tensors.items() if not key.endswith("num_batches_tracked")}
    native = cases.read_all(cases.NATIVE / cases.WEIGHTS)

    # ComfyUI and others know Wan's model by its keys, so there are no further ones.
    convert.export_dit(student, tmp_path / "native", layout="native")
    assert cases.read_all(tmp_path / "native" / FILE).keys() == native.keys()
    alone = cases.read_all(tmp_path / "native" / "interpolator" / FILE)
    assert alone.keys() == {key.removeprefix(PREFIX) for key in weights}
    for place in (tmp_path / "native", tmp_path / "native" / FILE):
        kernel = convert.open_interpolator_of(place).array("out_conv.kernel")
        np.testing.assert_array_equal(kernel, open_weights(student, INTERPOLATOR).array("out_conv.kernel"))
    convert.export_dit(student, tmp_path / "native", layout="native", overwrite=True)

    convert.export_dit(student, tmp_path / "inside", layout="native", interpolator_inside=True)
    written = cases.read_all(tmp_path / "inside" / FILE)
    assert written.keys() == native.keys() | weights.keys()
    for key, array in weights.items():
        np.testing.assert_array_equal(written[key], array)
    dit = cases.leaves_of(convert.load_dit(cases.NATIVE))
    for folder in ("native", "inside"):
        for key, array in cases.leaves_of(convert.load_dit(tmp_path / folder)).items():
            np.testing.assert_array_equal(array, dit[key])

    convert.export_dit(student, tmp_path / "diffusers", layout="diffusers")
    assert (
        cases.read_all(tmp_path / "diffusers" / "transformer" / FILE).keys()
        == cases.read_all(cases.DIFFUSERS / "transformer" / FILE).keys()
    )
    alone = cases.read_all(tmp_path / "diffusers" / "interpolator" / FILE)
    assert alone.keys() == {key.removeprefix(PREFIX) for key in weights}
    convert.export_dit(student, tmp_path / "diffusers", layout="diffusers", overwrite=True)

    convert.export_dit(tmp_path / "diffusers", tmp_path / "again", layout="native", interpolator_inside=True)
    assert cases.read_all(tmp_path / "again" / FILE).keys() == written.keys()
    half = {"layout": "native", "dtype": ml_dtypes.bfloat16, "interpolator_inside": True}
    convert.export_dit(student, tmp_path / "half", **half)
    assert {str(array.dtype) for array in cases.read_all(tmp_path / "half" / FILE).values()} == {"bfloat16"}


def test_a_student_is_searched_for_an_interpolator_wherever_it_may_lie(file, tensors, tmp_path):
    assert convert.open_interpolator_of(cases.NATIVE) is None
    assert convert.open_interpolator_of(cases.DIFFUSERS) is None
    assert convert.open_interpolator_of(cases.DIFFUSERS / "transformer") is None
    assert convert.open_interpolator_of(cases.NATIVE / cases.WEIGHTS) is None
    assert convert.open_interpolator_of(cases.training_run(tmp_path / "run", steps=(10,))) is None
    assert convert.open_interpolator_of(with_student(tensors, tmp_path / "avd")).config.widths == (8, 12, 16)
    cases.copy(cases.DIFFUSERS, tmp_path / "student")
    write_interpolator(open_weights(file, INTERPOLATOR), tmp_path / "student" / "interpolator")
    for path in ("student", "student/transformer", f"student/transformer/{FILE}"):
        assert convert.open_interpolator_of(tmp_path / path).config.widths == (8, 12, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": [8, 12, 20]}, "enc3.conv.0.weight has shape"),
        ({"widths": [8, 12]}, "must be three and one positive whole numbers"),
        ({"widths": 8}, "the field 'widths' is 8, expected three whole numbers"),
        ({"width": [8]}, "the field 'width' is not known (did you mean 'widths'?)"),
        ({"_class_name": "UNet"}, "_class_name is 'UNet', expected 'AVDInterpolator'"),
    ],
)
def test_a_config_that_does_not_fit(file, tmp_path, change, message):
    write_interpolator(open_weights(file, INTERPOLATOR), tmp_path / "interpolator")
    config = tmp_path / "interpolator" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match=re.escape(message)):
        convert.load_interpolator(tmp_path)


def test_runs_of_another_network_or_without_an_ema(file, tmp_path):
    run = lay_out("own run", file, None, tmp_path)
    with pytest.raises(UserError, match="holds the architecture 'interpolator', not a diffusion transformer"):
        convert.load_dit(run)
    assert convert.student_settings(run) is None
    assert convert.training_settings(run) == {"main": "interpolator"}
    shutil.rmtree(run / "checkpoints" / "7" / "interpolator_ema")
    with pytest.raises(UserError, match=r"checkpoints/7: holds no 'ema', but interpolator$"):
        convert.load_interpolator(run, key="ema")


def test_missing_keys_and_other_networks(tensors, tmp_path):
    cases.write_all(tmp_path / "cut", {key: array for key, array in tensors.items() if "dec1" not in key})
    with pytest.raises(UserError, match=r"the keys do not fit the model; missing: dec1"):
        convert.load_interpolator(tmp_path / "cut" / FILE)
    with pytest.raises(UserError, match="holds a diffusion transformer, not a frame interpolator"):
        convert.load_interpolator(cases.NATIVE / cases.WEIGHTS)
    with pytest.raises(UserError, match="no interpolator here; expected interpolator/"):
        convert.load_interpolator(cases.DIFFUSERS)


def test_what_was_trained_here_is_written_into_a_bucket(bucket):
    made = Interpolator(InterpolatorConfig(4, (8, 8, 8)), nnx.Rngs(0))
    for _ in range(2):  # a run that resumes writes it again
        ship(made, bucket)
    found = convert.load_interpolator(bucket)
    for path, leaf in convert.flat_state(nnx.state(found)).items():
        np.testing.assert_array_equal(leaf, convert.flat_state(nnx.state(made))[path])
