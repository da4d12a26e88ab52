"""The ablation: which cells there are, that each runs once, resumes where it stopped, and what the report shows."""

import gc
import json
import math
import runpy
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from generation_cases import UMT5_SIZES, VAE, write_weights
from training_cases import run_method

from avd_jax.convert.architectures import UMT5, WAN_VAE
from avd_jax.data import shapes_world
from avd_jax.data.latents import EncodedSet, read_metadata
from avd_jax.data.shapes_world import STYLES
from avd_jax.errors import UserError
from avd_jax.experiments import ablation
from avd_jax.experiments.ablation import run_ablation
from avd_jax.experiments.ablation_report import write_report
from avd_jax.experiments.cells import default_config, plan, validate
from avd_jax.experiments.held_out import Made, drawn_videos
from avd_jax.fields import flatten
from avd_jax.methods.avd import method
from avd_jax.parallel.mesh import make_mesh
from avd_jax.training.metrics import MetricsWriter

CONFIGS = Path(__file__).parents[1] / "configs"


def make_config(weights, **changes):
    config = default_config()
    train = config.train
    train.init_from = str(weights)
    world = config.world
    world.clips, world.prompts, world.frames, world.height, world.width = 3, 4, 5, 32, 32
    train.num_steps, train.batch_size, train.fake_score_updates, train.sample_every = 2, 1, 1, 0
    train.compute_dtype = train.teacher_dtype = "float32"
    train.remat = "none"
    config.seeds, config.sweep_seeds, config.style.clips = (0, 1), (0,), 2
    config.evaluation.captions, config.evaluation.batch_size, config.evaluation.teacher_steps = 2, 2, 3
    for name, value in changes.items():
        config[name] = value
    return config


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def encoded(weights, tmp_path_factory):
    """The sets of an ablation, for tests that are not about how they are made."""
    folder = tmp_path_factory.mktemp("data")
    ablation._encode(make_config(weights), folder)
    return folder


def records(folder):
    encoded = EncodedSet(folder, read_metadata(folder).kind)
    return [encoded[i] for i in range(len(encoded))]


def names(config, tmp_path, **options):
    return [cell.name for cell in plan(config, tmp_path, **{"interpolator": False} | options)]


def test_the_cells(weights, tmp_path):
    found = names(make_config(weights), tmp_path)
    methods = ("dmd", "tr", "tr_reg", "tr_ada")
    assert found[:3] == ["real", "teacher", "teacher_few"]
    assert found[3:11] == [f"{method}_seed{seed}" for seed in (0, 1) for method in methods]
    sweeps = ["clip_none", "clip_1.2", "clip_1", "clip_0.4", "k_1", "k_10", "style"]
    collapses = [f"{collapse}_{method}" for collapse in ("long", "guided", "few") for method in ("dmd", "tr_ada")]
    assert found[11:] == [*(f"{sweep}_seed0" for sweep in (*sweeps, *collapses)), "real_outline"]
    with_vif = names(make_config(weights), tmp_path, interpolator=True)
    assert set(with_vif) - set(found) == {f"{name}_seed{seed}" for name in ("full_vif", "vif_later") for seed in (0, 1)}


def test_a_cell_differs_from_the_full_method_in_what_it_is_about(weights, tmp_path):
    cells = {cell.name: cell for cell in plan(make_config(weights), tmp_path, interpolator=True)}
    full = flatten(cells["tr_ada_seed0"].train)
    changes = {
        name: {key: value for key, value in flatten(cell.train).items() if value != full[key]}
        for name, cell in cells.items()
        if cell.train
    }
    assert changes["tr_ada_seed1"] == {"seed": 1}
    assert changes["dmd_seed0"] == {"loss.regression": 0.0, "loss.temporal": 0.0}
    assert changes["tr_seed0"] == {"loss.regression": 0.0}
    assert changes["tr_reg_seed0"] == {"loss.regression_weighting": "fixed"}
    assert changes["clip_none_seed0"] == {"loss.temporal_clip": -math.inf}
    assert changes["k_10_seed0"] == {"loss.adaptive_k": 10.0}
    assert changes["style_seed0"] == {"data.latents": str(tmp_path / "outline" / "latents")}
    assert changes["long_dmd_seed0"] == changes["dmd_seed0"] | {"num_steps": 240}
    assert changes["guided_tr_ada_seed0"] == {"guidance_scale": 6.0}
    assert changes["few_tr_ada_seed0"] == {"data.prompts": str(tmp_path / "prompts_8")}
    assert set(changes["full_vif_seed0"]) == {"half_rate.steps", "half_rate.interpolator"}
    assert cells["vif_later_seed1"].student == "tr_ada_seed1"
    assert cells["tr_ada_seed0"].sampling["half_rate_steps"] == 0


def test_commands_that_share_a_workdir_encode_in_turn(weights, tmp_path, monkeypatch):
    begun, both = threading.Event(), []

    def encode(config, data):
        both.append("begins")
        begun.set()
        time.sleep(0.2)
        both.append("ends")

    monkeypatch.setattr(ablation, "_encode", encode)
    monkeypatch.setattr(ablation, "_run_cell", lambda *cell: 1)
    other = threading.Thread(target=run_ablation, args=(make_config(weights), tmp_path), kwargs={"report": print})
    other.start()
    assert begun.wait(60)
    assert run_ablation(make_config(weights), tmp_path, report=print) == 1
    other.join()
    assert both == ["begins", "ends"] * 2


def test_the_cheaper_cycle_is_tried_with_every_seed(weights, tmp_path):
    cells = {cell.name: cell for cell in plan(make_config(weights, cheaper=True), tmp_path, interpolator=False)}
    for seed in (0, 1):
        for name in ("dmd", "tr_ada"):
            same, cheaper = (flatten(cells[f"{name}_seed{seed}"].train) for name in (name, f"cheaper_{name}"))
            assert {key: value for key, value in cheaper.items() if value != same[key]} == {
                "fake_score_samples": "a_cycle"
            }


def test_rcm_shares_what_the_others_have_and_serves_every_number_of_steps(weights, tmp_path):
    config = make_config(weights)
    config.rcm.num_steps, config.rcm.optimizer.learning_rate, config.train.guidance_scale = 79, 3e-5, 3.0
    validate(config)
    cells = {cell.name: cell for cell in plan(config, tmp_path, interpolator=True)}
    assert [name for name in cells if name.startswith("rcm") and name.endswith("1")] == [
        *("rcm_seed1", "rcm_2_seed1", "rcm_1_seed1")
    ]
    train = cells["rcm_seed1"].train
    assert (train.method, train.seed, train.num_steps, train.guidance_scale) == ("rcm", 1, 79, 3.0)
    assert (train.optimizer.learning_rate, train.batch_size) == (3e-5, config.train.batch_size)
    assert train.data.latents == cells["dmd_seed1"].train.data.latents
    assert "loss.regression" not in flatten(train)
    few = cells["rcm_2_seed1"]
    assert (few.train, few.student, few.sampling["steps"]) == (None, "rcm_seed1", 2)
    decided = {name: ablation._settings(cell, config, {}) for name, cell in cells.items()}
    assert decided["rcm_seed0"]["train"]["consistency.warmup"] == 1000
    assert "consistency.warmup" not in decided["dmd_seed0"]["train"]
    config.rcm.consistency.deviation = 0.0
    with pytest.raises(UserError, match=r"^config\.rcm\.consistency\.deviation=0\.0 must be positive"):
        validate(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": ()}, r"config\.seeds=\(\) must be"),
        ({"seeds": (1, 1)}, "must be different numbers"),
        ({"sweep_seeds": (7,)}, "must be among config.seeds"),
        ({"collapse": {**default_config().collapse, "prompts": -1}}, r"config\.collapse\.prompts=-1 must be"),
        ({"world": {**default_config().world, "clips": 0}}, r"config\.world\.clips=0 must be at least 1"),
        ({"world": {**default_config().world, "prompts": 0}}, r"config\.world\.prompts=0 must be at least 1"),
        ({"world": {**default_config().world, "frames": 16}}, r"config\.world\.frames 16 is not 4n\+1; try 17"),
        ({"world": {**default_config().world, "width": 40}}, r"config\.world\.width 40 is not a multiple of 16"),
        ({"world": {**default_config().world, "fps": 0.0}}, r"config\.world\.fps=0\.0 must be positive"),
    ],
)
def test_wrong_fields_are_named(weights, changes, message):
    with pytest.raises(UserError, match=message):
        validate(make_config(weights, **changes))


def test_wrong_fields_of_the_training_are_named_as_the_user_knows_them(weights):
    config = make_config(weights)
    config.train.num_steps = 0
    with pytest.raises(UserError, match=r"^config\.train\.num_steps=0 must be"):
        validate(config)
    for kind in ("latents", "prompts"):
        config = make_config(weights)
        config.train.data[kind] = "somewhere"
        with pytest.raises(UserError, match=rf"config\.train\.data\.{kind} must be empty"):
            validate(config)


def test_validation_changes_nothing(weights):
    config = make_config(weights)
    before = flatten(config)
    validate(config)
    assert flatten(config) == before


def test_the_config_file_has_the_world_that_it_always_had():
    config = runpy.run_path(str(CONFIGS / "tiny_ablation.py"))["get_config"]()
    validate(config)
    size = {"frames": 17, "height": 64, "width": 64, "fps": 16.0}
    assert config.world.to_dict() == {"clips": 128, "prompts": 256, **size}


@pytest.fixture
def stand_ins(monkeypatch):
    """Trainings and samplings that only note that they were asked for."""
    calls = []

    def train(recipe, config, workdir):
        calls.append(("train", workdir.name))
        (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
        entry = {"step": 1, "loss/regression": 0.5, "meter/saturation": 1.1}
        (workdir / "metrics.jsonl").write_text(json.dumps(entry))
        return SimpleNamespace(status=143 if workdir.name in stopped else 0)

    def make_videos(options, count, folder, *, batch_size):
        calls.append(("make", folder.parent.name))
        return Made(drawn_videos(count, folder, frames=5, height=32, width=32, fps=16.0), 0.25)

    stopped = set()
    monkeypatch.setattr(ablation, "train", train)
    monkeypatch.setattr(ablation, "make_videos", make_videos)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # nothing large is in them, and all cells need the same
    return calls, stopped


def test_each_cell_runs_once_and_the_report_shows_all(weights, encoded, tmp_path, stand_ins, capsys):
    calls, stopped = stand_ins
    shutil.copytree(encoded, tmp_path / "data")
    config = make_config(weights)
    stopped.add("tr_seed0")
    assert run_ablation(config, tmp_path, report=write_report) == 143
    assert calls[-1] == ("train", "tr_seed0")
    assert not (tmp_path / "cells" / "tr_seed0" / "result.json").exists()
    stopped.clear()
    before = len(calls)
    assert run_ablation(config, tmp_path, report=write_report) == 0
    assert calls[before:][:2] == [("train", "tr_seed0"), ("make", "tr_seed0")]
    assert ("train", "dmd_seed0") not in calls[before:]
    out = capsys.readouterr().out
    assert "[1/21] tr_seed0" in out
    before = len(calls)
    assert run_ablation(config, tmp_path, report=write_report) == 0
    assert calls[before:] == []

    page = (tmp_path / "report.html").read_text()
    for text in (
        "92.39",
        "85.56",
        "+TR+AdaLoss",
        "clip none",
        "k = 10",
        "outline style",
        "few prompts",
        "Plain DMD loses motion.",
    ):
        assert text in page
    assert page.count("Regression loss</text>") == 5  # of the table, and of each sweep
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len(table) == 9
    assert len({line.count("|") for line in table}) == 1
    record = json.loads((tmp_path / "results.json").read_text())
    assert len(record["methods"]["tr_ada"]) == 2
    assert record["methods"]["dmd"][0]["seconds"] == 0.25
    assert record["methods"]["real_outline"][0]["style"] == pytest.approx(1)
    assert all(claim["outcome"] in ("seen here", "not seen", "opposite") for claim in record["claims"])


def test_some_cells_only_and_the_report_of_what_there_is(weights, tmp_path, stand_ins):
    calls, _ = stand_ins
    config = make_config(weights)
    with pytest.raises(UserError, match="has no finished cell"):
        run_ablation(config, tmp_path, run=False, report=write_report)
    with pytest.raises(UserError, match="matches none of real, teacher"):
        run_ablation(config, tmp_path, only=["dmdd*"], report=write_report)
    assert run_ablation(config, tmp_path, only=["real", "dmd_*"], report=write_report) == 0
    assert [name for kind, name in calls if kind == "train"] == ["dmd_seed0", "dmd_seed1"]
    ids = {
        folder: [record["clip_id"] for record in records(tmp_path / "data" / folder / "latents")] for folder in STYLES
    }
    assert ids["painted"] == ["shapes_world@000000", "shapes_world@000001", "shapes_world@000002"]
    assert ids["outline"] == ["shapes_world_outline@000000", "shapes_world_outline@000001"]
    for folder, count in (("painted/prompts", 4), ("prompts_8", 8)):
        texts = [record["text"] for record in records(tmp_path / "data" / folder)]
        assert texts == [shapes_world.caption(i) for i in range(3, 3 + count)]
    info = read_metadata(tmp_path / "data" / "outline" / "latents")
    assert (info.frames, info.height, info.width, info.fps) == (5, 32, 32, 16.0)
    (tmp_path / "report.html").unlink()
    assert run_ablation(config, tmp_path, run=False, report=write_report) == 0
    assert "DMD" in (tmp_path / "report.html").read_text()
    assert len(calls) == 4


def test_other_settings_are_run_again(weights, encoded, tmp_path, stand_ins):
    calls, _ = stand_ins
    shutil.copytree(encoded, tmp_path / "data")
    config = make_config(weights)
    run_ablation(config, tmp_path, only=["dmd_seed0"], report=write_report)
    config.train.log_every = 7  # decides no number
    run_ablation(config, tmp_path, only=["dmd_seed0"], report=write_report)
    assert len(calls) == 2
    config.evaluation.captions = 1
    run_ablation(config, tmp_path, only=["dmd_seed0"], report=write_report)
    assert len(calls) == 4
    config.world.fps = 8.0
    with pytest.raises(UserError, match="has no finished cell of this config yet"):
        run_ablation(config, tmp_path, run=False, report=write_report)
    with pytest.raises(UserError, match=r"painted/latents: holds a set encoded from fps 16\.0, not 8\.0"):
        run_ablation(config, tmp_path, report=write_report)


def bytes_on_devices():
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_encoders_are_released_before_the_first_training(weights, tmp_path):
    config = make_config(weights)
    encoders = 4 * sum(
        math.prod(leaf.shape)
        for architecture, sizes in ((WAN_VAE, VAE), (UMT5, UMT5_SIZES))
        for leaf in architecture.leaves(sizes).values()
    )
    before = bytes_on_devices()
    ablation._encode(config, tmp_path)
    for folder in ("painted/latents", "painted/prompts", "outline/latents", "prompts_8"):
        assert (tmp_path / folder / "dataset_info.json").exists()
    assert bytes_on_devices() - before < 0.05 * encoders


def test_a_real_cell_that_is_stopped_resumes_from_its_checkpoint(weights, encoded, tmp_path, monkeypatch):
    config = make_config(weights)
    shutil.copytree(encoded, tmp_path / "data")
    monkeypatch.setattr(ablation, "train", run_method)
    original = MetricsWriter.write

    def write(self, step, metrics):
        original(self, step, metrics)
        if step == 1:
            signal.raise_signal(signal.SIGTERM)

    config.train.num_steps = 4
    one = {"devices": jax.devices()[:1]}
    monkeypatch.setattr(method, "make_mesh", lambda **options: make_mesh(**options | one))
    monkeypatch.setattr(MetricsWriter, "write", write)
    asked = {"only": ["real", "teacher_few", "tr_ada_seed0"], "report": write_report}
    assert run_ablation(config, tmp_path, **asked) == 143
    monkeypatch.setattr(MetricsWriter, "write", original)
    assert run_ablation(config, tmp_path, **asked) == 0
    folder = tmp_path / "cells" / "tr_ada_seed0"
    assert "going on from step 2" in (folder / "log.txt").read_text()
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    record = json.loads((folder / "result.json").read_text())
    assert len(record["rows"]) == len(list((folder / "videos").glob("*.mp4"))) == 2
    assert "The student follows captions better" in (tmp_path / "report.html").read_text()
