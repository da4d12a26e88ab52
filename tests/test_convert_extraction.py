"""A student as a LoRA on its teacher, and as ComfyUI's one file: what comes out is the student again."""

import json
import re
import shutil

import convert_cases as cases
import ml_dtypes
import numpy as np
import pytest

from avd_jax import convert
from avd_jax.convert.adapted import with_adapters
from avd_jax.convert.adapter_keys import STYLES, module_of
from avd_jax.convert.architectures import WAN_DIT
from avd_jax.convert.extraction import FULL
from avd_jax.convert.fingerprint import fingerprint
from avd_jax.convert.low_rank import leading
from avd_jax.convert.weights import open_weights
from avd_jax.errors import UserError

# Linear layers of the fixture: the widths are 24 and 40, so no matrix has a rank above 24.
MOST = 24


def leaves(path, lora=""):
    return dict(with_adapters(open_weights(path, WAN_DIT), str(lora)).arrays(np.float32))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A student of the fixture, every parameter of which has changed."""
    folder = tmp_path_factory.mktemp("student")
    rng = np.random.default_rng(0)
    tensors = cases.read_all(cases.NATIVE / cases.WEIGHTS)
    changed = {k: a + 0.1 * rng.standard_normal(a.shape).astype(np.float32) for k, a in tensors.items()}
    cases.write_all(folder, changed)
    shutil.copy(cases.NATIVE / "config.json", folder)
    (folder / "avd_student.json").write_text(json.dumps(cases.STUDENT))
    return folder


def export(student, folder, rank, style="comfyui", dtype=np.float32, **options):
    return convert.export_lora(student, folder, rank=rank, style=style, dtype=dtype, teacher=cases.NATIVE, **options)


def norm(arrays):
    return np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in arrays))


def distance(one, other):
    return norm(one[path] - other[path] for path in other) / norm(other.values())


def test_a_matrix_is_cut_as_the_best_approximation_is():
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.standard_normal((96, 64)))
    right, _ = np.linalg.qr(rng.standard_normal((64, 64)))
    values = (np.arange(1, 65) ** -0.5).astype(np.float32)  # they fall slowly, as a student's do
    matrix = (left * values @ right.T).astype(np.float32)
    u, s, vt = leading(matrix, 12)
    assert (u.shape, s.shape, vt.shape) == ((96, 12), (12,), (12, 64))
    np.testing.assert_allclose(u.T @ u, np.eye(12), atol=1e-4)
    best = np.sqrt(np.sum(values[12:] ** 2))
    assert best <= np.linalg.norm(matrix - u * s @ vt) + 1e-4 <= 1.01 * best + 1e-4
    # What the errors by rank are computed from.
    np.testing.assert_allclose(np.sum(matrix**2) - np.sum(s**2), np.linalg.norm(matrix - u * s @ vt) ** 2, rtol=1e-3)
    u, s, vt = leading(matrix, 1000)
    np.testing.assert_allclose(u * s @ vt, matrix, atol=1e-5)


@pytest.mark.parametrize("style", STYLES)
def test_full_rank_is_the_student(style, student, tmp_path):
    settings, errors = export(student, tmp_path / "lora", FULL, style)
    assert settings == cases.STUDENT
    assert errors["full"][0] == 0
    assert distance(leaves(cases.NATIVE, tmp_path / "lora"), leaves(student)) < 1e-6
    files = sorted(file.name for file in (tmp_path / "lora").glob("*.safetensors"))
    name = "wan2.1_t2v_4step_lora_full"
    assert files == [f"{name}.safetensors", *([f"{name}_rest.safetensors"] if style == "diffusers" else [])]


def test_the_errors_by_rank_are_those_of_the_merged_weights(student, tmp_path):
    _, errors = export(student, tmp_path / "lora", 5)
    assert list(errors) == ["5", "16", "full"]
    teacher, wanted = leaves(cases.NATIVE), leaves(student)
    whole = norm(wanted[path] - teacher[path] for path in wanted)
    merged = leaves(cases.NATIVE, tmp_path / "lora")
    left = norm(wanted[path] - merged[path] for path in wanted) / whole
    np.testing.assert_allclose(errors["5"][0], left, rtol=1e-3)
    before, after = (cases.read_all(folder / cases.WEIGHTS) for folder in (cases.NATIVE, student))
    for rank in (5, 16):
        best = 0.0
        for key, array in after.items():
            if key.endswith("weight") and array.ndim == 2:
                best += np.sum(np.linalg.svd(array - before[key], compute_uv=False)[rank:] ** 2)
        np.testing.assert_allclose(errors[str(rank)][0], np.sqrt(best) / whole, rtol=1e-3)
    assert errors["5"][1] < errors["16"][1] < errors["full"][1]
    stored = cases.read_all(next((tmp_path / "lora").glob("*.safetensors")))
    assert sum(array.nbytes for array in stored.values()) == errors["5"][1]


def test_half_precision_costs_half_and_rounds_once(student, tmp_path):
    export(student, tmp_path / "lora", FULL, dtype=ml_dtypes.bfloat16)
    assert 1e-5 < distance(leaves(cases.NATIVE, tmp_path / "lora"), leaves(student)) < 1e-3


def test_comfyui_and_kohya_find_every_key(student, tmp_path):
    """By the rules of ComfyUI's comfy/lora.py: a weight is known by its module, others by their own name."""
    native = list(cases.read_all(cases.NATIVE / cases.WEIGHTS))
    modules = {key.removesuffix(".weight") for key in native if key.endswith(".weight")}
    others = {key for key in native if not key.endswith(".weight")}
    known = {f"diffusion_model.{name}" for name in modules | others}
    known_by_kohya = {f"lora_unet_{name.replace('.', '_')}" for name in modules}
    for style, bases in (("comfyui", known), ("kohya", known_by_kohya)):
        export(student, tmp_path / style, 4, style)
        keys = list(cases.read_all(next((tmp_path / style).glob("*.safetensors"))))
        ends = re.compile(r"\.(lora_up\.weight|lora_down\.weight|alpha|diff|diff_b)$")
        named = {ends.sub("", key) for key in keys}
        assert all(ends.search(key) for key in keys)
        if style == "kohya":  # the one parameter that no key of kohya's stands for, as the card says
            named = {name for name in named if not name.endswith("_modulation")}
        assert named <= bases
        changed = {module_of(key) for key in native} - {f"blocks.{i}.modulation" for i in (0, 1)} - {"head.modulation"}
        assert len(named - {f"diffusion_model.{key}" for key in others}) == len(changed)


def test_what_cannot_be_extracted(student, tmp_path):
    for options, message in (
        ({"rank": MOST + 1}, "--rank 25: no matrix of this model has more than 24; give 1 to 24, or full"),
        ({"rank": 4, "teacher": ""}, "--teacher is missing: "),
    ):
        arguments = {"style": "comfyui", "teacher": cases.NATIVE} | options
        with pytest.raises(UserError) as caught:
            convert.export_lora(student, tmp_path / "lora", **arguments)
        assert str(caught.value).startswith(message)
        assert not (tmp_path / "lora").exists()
    with pytest.raises(UserError, match="--teacher: has width 128 and 4 blocks, the student width 24 and 2 blocks"):
        convert.export_lora(student, tmp_path / "lora", rank=4, style="comfyui", teacher="weights/tiny")


def test_the_teacher_that_a_run_names_must_be_what_it_started_from(tmp_path):
    run = cases.training_run(tmp_path / "run", steps=(10,))
    (run / "config.json").write_text(json.dumps({"init_from": str(cases.NATIVE)}))
    file = run / "checkpoints" / "10" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    for began_with in ("another", fingerprint(open_weights(cases.NATIVE, WAN_DIT))):
        file.write_text(json.dumps(meta | {"inputs": {"init_from": began_with}}))
        if began_with == "another":
            with pytest.raises(UserError, match="holds other weights than those that the run started from"):
                convert.export_lora(run, tmp_path / "lora", rank=4, style="comfyui")
    convert.export_lora(run, tmp_path / "lora", rank=4, style="comfyui")


def test_an_adapter_is_merged_into_an_export_and_named_in_its_card(student, tmp_path):
    export(student, tmp_path / "lora", FULL)
    convert.export_dit(cases.NATIVE, tmp_path / "out", layout="native", lora=f"{tmp_path / 'lora'}:1")
    assert distance(leaves(tmp_path / "out"), leaves(student)) < 1e-6
    assert convert.student_settings(tmp_path / "out") == cases.STUDENT  # the adapter makes the teacher a student
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Merged into it: `lora:1`" in card
    with pytest.raises(UserError, match="pass --overwrite"):
        export(student, tmp_path / "lora", FULL)
    export(student, tmp_path / "lora", 4, overwrite=True)
    assert [file.name for file in (tmp_path / "lora").glob("*full*")] == []


@pytest.mark.parametrize("dtype", ["float16", "fp8"])
def test_comfyuis_one_file(dtype, student, tmp_path):
    assert convert.export_dit(student, tmp_path / "out", layout="comfyui", dtype=dtype) == cases.STUDENT
    file = tmp_path / "out" / "diffusion_models" / f"wan2.1_t2v_4step_{dtype}.safetensors"
    stored, wanted = cases.read_all(file), cases.read_all(student / cases.WEIGHTS)
    scales = {key for key in stored if key.endswith(".scale_weight")}
    assert stored.keys() - scales - {"scaled_fp8"} == wanted.keys()
    half = ml_dtypes.bfloat16 if dtype == "fp8" else np.dtype(dtype)
    assert stored["text_embedding.0.weight"].dtype == half
    for exact in ("blocks.0.modulation", "blocks.1.self_attn.norm_q.weight", "time_projection.1.weight"):
        np.testing.assert_array_equal(stored[exact], wanted[exact])
    matrices = {key for key in wanted if key.startswith("blocks") and key.endswith("weight") and wanted[key].ndim == 2}
    if dtype != "fp8":
        assert not scales
        assert {stored[key].dtype for key in matrices} == {np.dtype(half)}
    else:
        assert scales == {f"{key}"[: -len("weight")] + "scale_weight" for key in matrices}
        assert (stored["scaled_fp8"].shape, stored["scaled_fp8"].dtype) == ((2,), ml_dtypes.float8_e4m3fn)
        for key in matrices:
            scale = stored[key[: -len("weight")] + "scale_weight"]
            assert (scale.shape, scale.dtype) == ((), np.float32)
            assert stored[key].dtype == ml_dtypes.float8_e4m3fn
            np.testing.assert_allclose(np.abs(stored[key].astype(np.float32)).max(), 448)
    read = leaves(tmp_path / "out")  # scales and all, as the loader for ComfyUI's files reads them
    assert distance(read, leaves(student)) < {"float16": 3e-4, "fp8": 3e-2}[dtype]
    card = (tmp_path / "out" / "README.md").read_text()
    for stated in (file.name, "CFG 1", "`1, 0.9, 0.757, 0.522, 0`", "`lcm`", "shift | off"):
        assert stated in card


@pytest.mark.parametrize("style", STYLES)
def test_the_card_of_a_lora(style, student, tmp_path):
    export(student, tmp_path / "lora", 4, style)
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "4-step Wan2.1 LoRA" in card
    assert "wan2.1_t2v_4step_lora_rank4.safetensors" in card
    assert ("load_lora_weights" in card) == (style == "diffusers")
    assert ('subfolder="scheduler"' in card) == (tmp_path / "lora" / "scheduler" / "scheduler_config.json").is_file()
    assert ("`1, 0.9, 0.757, 0.522, 0`" in card) == (style != "diffusers")
    assert "{" not in card.replace("f{", "")
    assert "| 4 | 0." in card
