"""Whole runs in one process, with a linear network: logs, checkpoints, resume, signals, bad input."""

import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from generation_cases import VAE, InMemory
from training_cases import (
    DIT,
    linear_params,
    make_config,
    train,
    use_devices,
    use_linear_network,
    write_inputs,
    write_sets,
    write_weights,
)

from avd_jax import convert
from avd_jax.convert.architectures import WAN_VAE
from avd_jax.data.atomic import only_writer
from avd_jax.errors import UserError
from avd_jax.training import assembly
from avd_jax.training.assembly import Assembly
from avd_jax.training.ledger import KINDS
from avd_jax.training.metrics import MetricsWriter
from avd_jax.training.update import make_step
from avd_jax.training.workdir import StopSignals


@pytest.fixture(autouse=True, scope="module")
def linear():
    with pytest.MonkeyPatch.context() as patch:
        use_linear_network(patch.setattr)
        use_devices(patch.setattr, 1)
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Weights and sets that a run takes."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def settings(inputs, **fields):
    base = {
        **inputs,
        "num_steps": 5,
        "batch_size": 2,
        "fake_score_updates": 2,
        "checkpoint_every": 2,
        "sample_every": 0,
        "ema_decay": 0.9,
        "optimizer__learning_rate": 1e-3,
        "optimizer__fake_score_learning_rate": 1e-3,
    }
    return make_config(**base | fields)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def numbers(workdir):
    """The metrics of the updates, but for the times."""
    updates = [line for line in lines(workdir) if "loss/generator" in line]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in updates]


def steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def contents(workdir, step):
    """Every array of a checkpoint, as bytes, and its meta data but for the number of steps that was asked for."""
    folder, found = workdir / "checkpoints" / str(step), {}
    for item in ("generator", "fake_score", "generator_ema", "optimizers", "progress"):
        tree = ocp.StandardCheckpointer().restore(folder / item)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[f"{item}{jax.tree_util.keystr(path)}"] = np.asarray(leaf).tobytes()
    meta = json.loads((folder / "meta" / "metadata").read_text())
    meta["settings"].pop("num_steps")
    return found, meta


def assert_same_run(workdir, expected, step):
    found, meta = contents(workdir, step)
    wanted, wanted_meta = contents(expected, step)
    assert len(found) > 20
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert found.keys() == wanted.keys()
    assert meta == wanted_meta
    assert numbers(workdir) == numbers(expected)


@pytest.fixture(scope="module")
def straight(linear, inputs, tmp_path_factory):
    """A run that was never stopped."""
    workdir = tmp_path_factory.mktemp("straight")
    assert train(settings(inputs), workdir) == 0
    return workdir


def test_what_a_run_leaves(straight):
    assert [line["step"] for line in lines(straight)] == [1, 2, 3, 4, 5]
    names = {
        "step",
        *(f"loss/{name}" for name in ("generator", "distribution_matching", "regression", "temporal", "fake_score")),
        *("regression/weight", *(f"regression/ema_{i}" for i in range(4))),
        *("grad_norm/generator", "grad_norm/fake_score", "skipped/total", "skipped/in_row"),
        *("time/step_seconds", "time/steps_per_second", "time/goodput", "time/unix"),
        *(f"time/spent_{kind}" for kind in KINDS),
    }
    assert all(set(line) == names for line in lines(straight))
    assert len({line["loss/generator"] for line in lines(straight)}) == 5
    assert steps(straight) == [4, 5]
    assert json.loads((straight / "config.json").read_text())["num_steps"] == 5
    assert (straight / "parameters.txt").read_text().count("\n") > 3
    _, meta = contents(straight, 5)
    assert meta["step"] == 5
    assert meta["student"]["timesteps"] == [1000.0, 900.0, 757.0, 522.0]
    assert meta["student"]["guidance_scale"] == 5.0
    assert meta["architecture"]["config"]["dim"] == DIT.dim


def test_the_cost_is_printed_first_and_costs_no_second_trace(inputs, tmp_path, capsys, monkeypatch):
    """Of a linear network, whose inputs ask for no gradient: a backward pass is one product, remat has none."""
    traced = []

    def counted(method, update):
        return lambda *args: traced.append(update.network) or make_step(method, update)(*args)

    monkeypatch.setattr(assembly, "make_step", counted)
    train(settings(inputs, num_steps=2, fake_score_updates=1, remat="block"), tmp_path)
    assert sorted(traced) == ["fake_score", "generator"], "the run passes what its programs declare"
    out = capsys.readouterr().out
    fake_score, generator = 1.5 + 1 + 2, (1.5 + 2) + 1 + 2 + 2
    assert f"one cycle (1 fake_score update, 1 generator update) costs {fake_score + generator:g} forward passes" in out
    assert f" of the DiT an example: {fake_score:g} a fake_score update, {generator:g} a generator update" in out
    assert out.index("num_steps = 2") < out.index("one cycle") < out.index("step 1/2") < out.index("done: 2 steps")


def test_a_finished_run_says_so(straight, inputs, capsys):
    before = (straight / "metrics.jsonl").read_text()
    assert train(settings(inputs), straight) == 0
    assert "the run is complete: 5 of 5 steps" in capsys.readouterr().out
    assert (straight / "metrics.jsonl").read_text() == before


def test_more_steps_later_are_the_steps_of_one_run(straight, inputs, tmp_path):
    for num_steps in (1, 3, 5):
        assert train(settings(inputs, num_steps=num_steps), tmp_path) == 0
    assert_same_run(tmp_path, straight, 5)


def test_sigterm_saves_first_and_the_same_command_resumes(straight, inputs, tmp_path, monkeypatch, capsys):
    original = MetricsWriter.write

    def write(self, step, metrics):
        original(self, step, metrics)
        if step == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(MetricsWriter, "write", write)
    assert train(settings(inputs), tmp_path) == 128 + signal.SIGTERM
    monkeypatch.setattr(MetricsWriter, "write", original)
    assert "stopped by SIGTERM after step 2, which is saved" in capsys.readouterr().out
    assert steps(tmp_path) == [2]
    assert train(settings(inputs), tmp_path) == 0
    assert_same_run(tmp_path, straight, 5)


def test_sigterm_before_the_first_step(straight, inputs, tmp_path, monkeypatch):
    config = settings(inputs, checkpoint__best_metric="loss/regression", checkpoint__keep=1)
    original = Assembly.init_state

    def init_state(self):
        signal.raise_signal(signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(Assembly, "init_state", init_state)
    assert train(config, tmp_path) == 143
    assert steps(tmp_path) == [0]
    assert lines(tmp_path) == []
    assert train(config, tmp_path) == 0
    assert numbers(tmp_path) == numbers(straight)
    assert 0 not in steps(tmp_path)


def test_the_old_signal_handlers_come_back():
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]  # what they are depends on who started the tests
    with StopSignals() as stop:
        assert all(signal.getsignal(number) not in before for number in numbers)
    assert [signal.getsignal(number) for number in numbers] == before
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        assert [signal.getsignal(number) for number in numbers] == before, "a second signal is not caught"


def test_other_intervals(inputs, tmp_path):
    assert train(settings(inputs, log_every=2, checkpoint_every=0), tmp_path) == 0
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 5]
    assert steps(tmp_path) == [5]


def test_accumulation_and_captions_as_prompts(inputs, tmp_path):
    config = settings(inputs, data__prompts="", accumulation_steps=2, num_steps=2, fake_score_updates=0)
    assert train(config, tmp_path) == 0
    assert "loss/fake_score" not in lines(tmp_path)[0]


def test_other_settings_need_another_workdir(straight, inputs):
    with pytest.raises(UserError) as error:
        train(settings(inputs, batch_size=4, seed=3), straight)
    assert "config.batch_size was 2, is 4" in str(error.value)
    assert "config.seed was 0, is 3" in str(error.value)
    assert "use them, or another --workdir" in str(error.value)
    # How long it runs and what is kept of it may change.
    assert train(settings(inputs, log_every=3, checkpoint_every=9, checkpoint__keep=1), straight) == 0
    assert train(settings(inputs), straight) == 0


def test_rates_and_weights_may_change_and_are_written_down(straight, inputs, tmp_path, capsys):
    workdir = shutil.copytree(straight, tmp_path / "run")
    changes = {"optimizer__learning_rate": 1e-4, "loss__temporal": 0.1, "optimizer__max_grad_norm": 1.0}
    assert train(settings(inputs, **changes, num_steps=6), workdir) == 0
    out = capsys.readouterr().out
    assert "going on from step 5, with config.loss.temporal 0.1 instead of 0.05, config.optimizer." in out
    (record,) = [json.loads(line) for line in (workdir / "changes.jsonl").read_text().splitlines()]
    assert record["step"] == 5
    assert record["changed"] == {
        "loss.temporal": [0.05, 0.1],
        "optimizer.learning_rate": [1e-3, 1e-4],
        "optimizer.max_grad_norm": [10.0, 1.0],
    }
    assert not (straight / "changes.jsonl").exists()
    # Once written down they are the run's own.
    assert train(settings(inputs, **changes, num_steps=7), workdir) == 0
    assert len((workdir / "changes.jsonl").read_text().splitlines()) == 1
    assert json.loads((workdir / "config.json").read_text())["optimizer.learning_rate"] == 1e-4


def test_a_change_that_adds_or_drops_a_network_is_refused_and_not_written_down(straight, inputs, tmp_path):
    workdir = shutil.copytree(straight, tmp_path / "run")
    before = (workdir / "config.json").read_text()
    with pytest.raises(UserError, match=r"/5: the run trains fake_score 2 times and generator 1 times a"):
        train(settings(inputs, loss__distribution_matching=0.0, num_steps=6), workdir)
    assert (workdir / "config.json").read_text() == before
    assert not (workdir / "changes.jsonl").exists()
    assert train(settings(inputs, num_steps=6), workdir) == 0


def test_what_fits_a_run_to_other_devices_may_change(straight, inputs, tmp_path):
    workdir = shutil.copytree(straight, tmp_path / "run")
    fields = {"remat": "none", "attention__kernel": "xla", "accumulation_steps": 2, "optimizer__memory": "host"}
    assert train(settings(inputs, **fields, num_steps=6), workdir) == 0
    assert steps(workdir)[-1] == 6


def test_weights_and_sets_may_move_but_not_change(straight, inputs, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    moved = {name: str(shutil.copytree(path, tmp_path / name)) for name, path in inputs.items()}
    assert train(settings(inputs | moved, num_steps=6), workdir) == 0
    latents, _ = write_sets(tmp_path / "others", clips=6)
    for field, path in (
        ("data.latents", latents),
        ("data.prompts", ""),
        ("init_from", write_weights(tmp_path / "dit", seed=1)),
    ):
        other = settings(inputs | {field.replace(".", "__"): str(path)}, num_steps=7)
        with pytest.raises(UserError, match=rf"/6: the run began with other contents of config.{field}; name a copy"):
            train(other, workdir)


def test_wrong_settings_can_be_put_right_before_the_first_checkpoint(inputs, tmp_path):
    with pytest.raises(UserError, match="nowhere: holds no encoded set"):
        train(settings(inputs, data__latents=str(tmp_path / "nowhere")), tmp_path / "run")
    assert train(settings(inputs, num_steps=1), tmp_path / "run") == 0


def test_weights_of_another_architecture(inputs, tmp_path):
    weights = write_weights(tmp_path / "dit")
    config = settings(inputs | {"init_from": str(weights)}, num_steps=1)
    train(config, tmp_path / "run")
    (weights / "diffusion_pytorch_model.safetensors").unlink()
    write_weights(weights, DIT.__class__(**DIT.__dict__ | {"num_layers": 3}))
    with pytest.raises(UserError, match=r"/1: is of another architecture \(num_layers 2 there, 3 here\); give its own"):
        train(config, tmp_path / "run")


def test_updates_that_are_not_finite_stop_the_run(inputs, tmp_path):
    """Though the updates of fake_score in between are good."""
    latents, prompts = write_sets(tmp_path, clips=2, bad=(0, 1))
    sets = {"data__latents": str(latents), "data__prompts": str(prompts)}
    config = settings(inputs | sets, num_steps=50, max_nonfinite=3, checkpoint_every=0)
    with pytest.raises(UserError, match=r"not finite in 3 updates in a row .*stopped after step 4, which is saved"):
        train(config, tmp_path / "run")
    assert steps(tmp_path / "run") == [4]
    assert [line["skipped/total"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]
    assert lines(tmp_path / "run")[0]["loss/generator"] is None
    folder = tmp_path / "run" / "checkpoints" / "4" / "generator"
    saved = ocp.StandardCheckpointer().restore(folder)
    assert all(np.array_equal(saved[name], value) for name, value in linear_params().items())


def test_one_bad_clip_does_not_stop_a_run(inputs, tmp_path):
    latents, prompts = write_sets(tmp_path, clips=6, bad=(2,))
    sets = {"data__latents": str(latents), "data__prompts": str(prompts)}
    assert train(settings(inputs | sets, num_steps=6, max_nonfinite=4), tmp_path / "run") == 0
    skipped = lines(tmp_path / "run")[-1]["skipped/total"]
    assert 1 <= skipped <= 3


def other_sets(folder, **sizes):
    latents, prompts = write_sets(folder, clips=2, prompts=2, **sizes)
    return {"data__latents": str(latents), "data__prompts": str(prompts)}


def test_data_that_does_not_fit(inputs, tmp_path):
    cases = [
        ({"data__latents": inputs["data__prompts"]}, "is a set of prompts, not of latents"),
        ({"data__prompts": inputs["data__latents"]}, "is a set of latents, not of prompts"),
        ({"data__prompts": str(tmp_path / "nowhere")}, "nowhere: holds no encoded set"),
        ({"data__held_out": str(tmp_path / "nowhere.txt")}, "nowhere.txt: cannot be read"),
        (other_sets(tmp_path / "a", shape=(3, 4, 4, 16)), "has 16 channels and text_dim 16, the model of"),
        (other_sets(tmp_path / "b", text_dim=12), "has 4 channels and text_dim 12, the model of"),
        (other_sets(tmp_path / "c", shape=(3, 5, 4, 4)), r"patch \(1, 2, 2\) does not divide latents of \(3, 5, 4\)"),
        ({"data__prompts": other_sets(tmp_path / "d", text_dim=12)["data__prompts"]}, "text_dim is 12, that of"),
        ({"init_from": str(tmp_path / "nowhere")}, "nowhere"),
        ({"checkpoint__best_metric": "loss/generatr"}, r"is not logged \(did you mean 'loss/generator'\?\)"),
    ]
    for number, (fields, message) in enumerate(cases):
        with pytest.raises(UserError, match=message) as error:
            train(settings(inputs | fields), tmp_path / f"run{number}")
        assert "\n" not in str(error.value)


def test_a_batch_that_the_mesh_cannot_cut(inputs, tmp_path, monkeypatch):
    use_devices(monkeypatch.setattr, 4)
    message = r"a batch of 2 \(config.batch_size / accumulation_steps\) cannot be shared out over data=4"
    with pytest.raises(UserError, match=message):
        train(settings(inputs, batch_size=4, accumulation_steps=2), tmp_path)


def test_several_devices_make_the_same_run(straight, inputs, tmp_path, monkeypatch):
    use_devices(monkeypatch.setattr, 2)
    assert train(settings(inputs), tmp_path) == 0
    for line, expected in zip(numbers(tmp_path), numbers(straight), strict=True):
        assert line == pytest.approx(expected, rel=1e-3)


def test_samples(straight, inputs, tmp_path, capsys):
    convert.save_orbax(InMemory(WAN_VAE, VAE), tmp_path / "weights" / "vae")
    fields = {"sample__vae": str(tmp_path / "weights"), "sample__teacher_steps": 2}
    workdir, folder = tmp_path / "run", tmp_path / "run" / "samples"
    config = settings(inputs | fields, num_steps=3, sample_every=2, sample__prompts=2)
    assert train(config, workdir) == 0
    for step in (0, 2, 3):
        videos = sorted((folder / f"step_{step:06d}").glob("*.mp4"))
        assert [video.stem[:10].replace("_", " ").replace("-", " ") for video in videos] == ["0 prompt 0", "1 prompt 1"]
        assert (folder / f"step_{step:06d}.png").stat().st_size > 1000
    assert (folder / "step_000000.png").read_bytes() != (folder / "step_000002.png").read_bytes()
    assert len(list(folder.glob("teacher_latents_*.npy"))) == 1
    measured = [line for line in lines(workdir) if "meter/saturation" in line]
    assert [line["step"] for line in measured] == [0, 2, 3]
    assert all(line["meter/teacher_saturation"] > 0 and "samples/flicker" in line for line in measured)
    assert capsys.readouterr().out.count("sampling the teacher: 2 videos, 2x2 steps each") == 1

    # Other samples later: the teacher's are made anew, the training stays what it was.
    more = settings(inputs | fields, num_steps=4, sample_every=2, sample__prompts=3)
    assert train(more, workdir) == 0
    assert len(list((folder / "step_000004").glob("*.mp4"))) == 3
    assert "sampling the teacher: 3 videos" in capsys.readouterr().out
    assert numbers(workdir) == numbers(straight)[:4]


def test_samples_without_a_vae(inputs, tmp_path):
    with pytest.raises(UserError, match=r"^config.sample.vae: .*; or set sample_every=0 to train without samples"):
        train(settings(inputs, sample_every=1), tmp_path)


def test_a_workdir_that_cannot_be_made(inputs):
    with pytest.raises(UserError, match=r"^/dev/null/run: cannot be written \(Not a directory\); give another folder$"):
        train(settings(inputs), Path("/dev/null/run"))


def test_a_workdir_that_another_process_trains_in(inputs, tmp_path):
    with only_writer(tmp_path), pytest.raises(UserError, match="another process is writing to it"):
        train(settings(inputs), tmp_path)
