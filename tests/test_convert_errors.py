"""Whatever is wrong with a path ends in one line that names it; the neighbours of a failed write stay as they were."""

import asyncio
import errno
import functools
import json
import os
import shutil

import convert_cases as cases
import jax
import numpy as np
import pytest

from avd_jax import convert
from avd_jax.convert import orbax_io, safetensors_io, umt5_rules
from avd_jax.convert.architectures import UMT5, WAN_DIT
from avd_jax.convert.weights import open_weights
from avd_jax.errors import UserError
from avd_jax.models.umt5 import UMT5Config

CONFIG = "config.json"


def edit_config(folder, **changes):
    entries = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in entries.items() if value is not None}))


def edit_weights(folder, change):
    tensors = cases.read_all(folder / cases.WEIGHTS)
    change(tensors)
    cases.write_all(folder, tensors)


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def native_with(change):
    """Return a maker of a native folder to which `change(folder)` has been done."""

    def make(tmp_path):
        folder = cases.copy(cases.NATIVE, tmp_path / "wan")
        change(folder)
        return folder

    return make


def sharded_with(change):
    def make(tmp_path):
        folder = cases.sharded_copy(tmp_path / "wan")
        change(folder)
        return folder

    return make


def orbax_with(change):
    def make(tmp_path):
        convert.save_orbax(open_weights(cases.NATIVE, WAN_DIT), tmp_path / "ours" / "transformer")
        change(tmp_path / "ours" / "transformer")
        return tmp_path / "ours"

    return make


def run_with(change):
    def make(tmp_path):
        run = cases.training_run(tmp_path / "run", steps=(20,))
        change(run / "checkpoints" / "20")
        return run

    return make


def shard(folder, number=2):
    return sorted(folder.glob("*.safetensors"))[number - 1]


def text_encoder_file(tmp_path):
    config = UMT5Config(vocab_size=8, dim=8, ffn_dim=8, num_heads=1, head_dim=8, num_layers=1)
    tensors = cases.random_tensors(umt5_rules.native_rules(config), UMT5, config)
    cases.write_all(tmp_path / "t5", tensors)
    return tmp_path / "t5" / cases.WEIGHTS


def other_orbax(folder):
    edit = json.loads((folder / CONFIG).read_text())
    edit["avd_jax"]["name"] = "wan_vae"
    (folder / CONFIG).write_text(json.dumps(edit))


def other_sizes(folder):
    edit = json.loads((folder / CONFIG).read_text())
    edit["avd_jax"]["config"]["num_layers"] = 3
    (folder / CONFIG).write_text(json.dumps(edit))


def drop_data(folder):
    for path in (folder / "ocdbt.process_0").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.unlink()
    for path in (folder / "d").iterdir():
        path.unlink()


def meta_with(**changes):
    def change(step):
        meta = json.loads((step / "meta" / "metadata").read_text()) | changes
        (step / "meta" / "metadata").write_text(json.dumps(meta))

    return change


def empty(tmp_path):
    return tmp_path


def parent_of_weights(tmp_path):
    cases.copy(cases.NATIVE, tmp_path / "all" / "wan")
    return tmp_path / "all"


def misspelt(tmp_path):
    cases.copy(cases.DIFFUSERS / "transformer", tmp_path / "hub" / "transfomer" / "x")
    return tmp_path / "hub"


def renamed(tensors):
    tensors["blocks.1.ffn.0.weigth"] = tensors.pop("blocks.1.ffn.0.weight")


BAD = {
    "no such path": (lambda tmp_path: tmp_path / "nowhere", ["nowhere", "no such file or folder"]),
    "path misspelt": (lambda tmp_path: cases.FIXTURES / "dit_natives", ["dit_natives", "did you mean 'dit_native'"]),
    "empty folder": (empty, ["no transformer here", "expected config.json", "found nothing"]),
    "parent folder": (parent_of_weights, ["did you mean", "all/wan"]),
    "subfolder misspelt": (misspelt, ["no transformer here", "did you mean 'transformer'"]),
    "another kind of file": (lambda tmp_path: cases.NATIVE / CONFIG, ["config.json", "not a file of weights"]),
    "missing key": (
        native_with(lambda folder: edit_weights(folder, lambda tensors: tensors.pop("head.head.bias"))),
        [cases.WEIGHTS, "missing: head.head.bias"],
    ),
    "extra key": (
        native_with(lambda folder: edit_weights(folder, lambda t: t.update({"img_emb.bias": np.zeros(2)}))),
        ["not known: img_emb.bias"],
    ),
    "renamed key": (
        native_with(lambda folder: edit_weights(folder, renamed)),
        ["missing: blocks.1.ffn.0.weight", "did you mean 'blocks.1.ffn.0.weigth'"],
    ),
    "misshapen key": (
        native_with(lambda folder: edit_weights(folder, lambda t: t.update({"head.head.bias": np.zeros(3)}))),
        ["head.head.bias has shape (3,), expected (16,)"],
    ),
    "config of another model": (
        native_with(lambda folder: edit_config(folder, ffn_dim=48)),
        ["ffn.0.weight has shape (40, 24), expected (48, 24)"],
    ),
    "config with too many layers": (native_with(lambda f: edit_config(f, num_layers=3)), ["missing: blocks.2."]),
    "config without a field": (native_with(lambda f: edit_config(f, num_heads=None)), [CONFIG, "'num_heads'"]),
    "config with a wrong value": (
        native_with(lambda f: edit_config(f, num_heads="two")),
        ["'num_heads' is 'two'"],
    ),
    "config with zero heads": (native_with(lambda f: edit_config(f, num_heads=0)), [CONFIG, "'num_heads' is 0"]),
    "config with a wrong patch": (
        native_with(lambda f: edit_config(f, patch_size=[2])),
        [CONFIG, "'patch_size' is [2]"],
    ),
    "image-to-video": (native_with(lambda f: edit_config(f, model_type="i2v")), [CONFIG, "model_type is 'i2v'"]),
    "damaged config": (native_with(lambda f: (f / CONFIG).write_text('{"dim": 24,')), [CONFIG, "not valid JSON"]),
    "config is a list": (native_with(lambda f: (f / CONFIG).write_text("[]")), [CONFIG, "expected an object"]),
    "truncated file": (native_with(lambda f: cut(f / cases.WEIGHTS)), [cases.WEIGHTS, "truncated"]),
    "truncated header": (native_with(lambda f: cut(f / cases.WEIGHTS, 0.01)), [cases.WEIGHTS, "truncated"]),
    "empty file": (native_with(lambda f: (f / cases.WEIGHTS).write_bytes(b"")), [cases.WEIGHTS, "truncated"]),
    "a web page": (
        native_with(lambda f: (f / cases.WEIGHTS).write_text("<html>not found</html>")),
        [cases.WEIGHTS, "no safetensors file"],
    ),
    "truncated shard": (sharded_with(lambda f: cut(shard(f))), ["-00002-of-", "truncated"]),
    "missing shard": (sharded_with(lambda f: shard(f).unlink()), ["-00002-of-", "missing", "index.json"]),
    "missing shard without index": (
        sharded_with(lambda f: [shard(f).unlink(), (f / f"{cases.WEIGHTS}.index.json").unlink()]),
        ["-00002-of-", "missing"],
    ),
    "damaged index": (
        sharded_with(lambda f: (f / f"{cases.WEIGHTS}.index.json").write_text("{}")),
        ["index.json", "weight_map"],
    ),
    "shard of another model": (sharded_with(lambda f: shutil.copy(shard(f, 1), shard(f, 2))), ["-00002-of-", "says"]),
    "another network": (text_encoder_file, [cases.WEIGHTS, "umT5 text encoder, not a diffusion transformer"]),
    "Orbax of another network": (orbax_with(other_orbax), [CONFIG, "'wan_vae'"]),
    "Orbax of other sizes": (orbax_with(other_sizes), ["has shape (2,", "(3,"]),
    "Orbax without config": (orbax_with(lambda folder: (folder / CONFIG).unlink()), ["without its config.json"]),
    "Orbax half-written": (orbax_with(lambda folder: (folder / "_METADATA").unlink()), ["no _METADATA"]),
    "Orbax without data": (orbax_with(drop_data), ["Orbax"]),
    "run without a checkpoint": (
        run_with(lambda step: shutil.rmtree(step)),
        ["no checkpoint has been saved here yet"],
    ),
    "run with an incomplete checkpoint": (
        run_with(lambda step: os.rename(step, f"{step}.orbax-checkpoint-tmp")),
        ["no complete checkpoint", "20.orbax-checkpoint-tmp"],
    ),
    "run whose latest checkpoint lost its meta": (
        run_with(lambda step: shutil.rmtree(step / "meta")),
        ["20: this checkpoint is incomplete (no meta/metadata); remove it, or name another step"],
    ),
    "run without the network": (
        run_with(lambda step: shutil.rmtree(step / "generator")),
        ["holds no 'generator', but fake_score, progress"],
    ),
    "one step, without meta": (
        lambda tmp_path: run_with(lambda step: shutil.rmtree(step / "meta"))(tmp_path) / "checkpoints" / "20",
        ["20: this checkpoint is incomplete (no meta/metadata); use another step"],
    ),
    "one step of another network, without meta": (
        lambda tmp_path: (
            run_with(lambda step: [shutil.rmtree(step / name) for name in ("meta", "generator")])(tmp_path)
            / "checkpoints"
            / "20"
        ),
        ["20: this checkpoint is incomplete (no meta/metadata); use another step"],
    ),
    "run of another network": (
        run_with(meta_with(architecture={"name": "unet", "config": {}})),
        ["metadata", "'unet'"],
    ),
    "run with an unknown size": (
        run_with(meta_with(architecture={"name": "wan_dit", "config": {"dims": 24}})),
        ["metadata", "'dims' is not known", "did you mean 'dim'"],
    ),
    "run without architecture": (run_with(meta_with(architecture=None)), ["metadata", "no architecture"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_weights_give_one_line_that_says_what_is_wrong(case, tmp_path):
    make, parts = BAD[case]
    path = make(tmp_path)
    with pytest.raises(UserError) as caught:
        convert.load_dit(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    for part in parts:
        assert part in message


@pytest.mark.parametrize("sharding", [None, lambda path, shape: jax.sharding.SingleDeviceSharding(jax.devices()[0])])
def test_an_array_of_an_orbax_checkpoint_that_is_cut_off(sharding, tmp_path):
    def cut_largest(folder):
        cut(max((path for path in folder.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size))

    with pytest.raises(UserError, match=r"transformer: cannot read the Orbax checkpoint \(.* write or copy it again$"):
        convert.load_dit(orbax_with(cut_largest)(tmp_path), sharding=sharding)


@pytest.mark.parametrize(
    ("load", "path", "parts"),
    [
        (convert.load_vae, cases.NATIVE, ["no vae here", "Wan2.1_VAE.pth"]),
        (convert.load_umt5, cases.NATIVE, ["no text_encoder here", "models_t5_umt5-xxl-enc-bf16.pth"]),
        (convert.load_tokenizer, cases.NATIVE, ["no tokenizer here", "google/umt5-xxl/"]),
        (convert.load_vae, cases.NATIVE / cases.WEIGHTS, ["diffusion transformer, not a video autoencoder"]),
        (lambda path: convert.load_dit(path, key="critic"), cases.NATIVE, ["holds no 'critic'"]),
        (lambda path: convert.find_components(path, ["vea"]), cases.NATIVE, ["'vea'", "did you mean 'vae'"]),
        (lambda path: convert.find_components(path, ["vae"]), cases.NATIVE, ["no vae here"]),
        (convert.find_components, cases.FIXTURES.parent, ["nothing to convert here"]),
    ],
)
def test_a_component_that_is_not_there(load, path, parts):
    with pytest.raises(UserError) as caught:
        load(path)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("old", [False, True])
def test_a_run_without_an_ema_says_what_it_holds(old, tmp_path):
    run = cases.training_run(tmp_path, steps=(20,), old=old)
    with pytest.raises(UserError) as caught:
        convert.load_dit(run, key="ema")
    assert str(caught.value) == f"{run}/checkpoints/20: holds no 'ema', but fake_score, generator, progress"
    with pytest.raises(UserError, match=r"holds no 'generatr', but .* \(did you mean 'generator'\?\)"):
        convert.load_dit(run, key="generatr")


def disk_full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_the_destination_as_it_was(existing, tmp_path, monkeypatch):
    weights = open_weights(cases.NATIVE, WAN_DIT)
    ours, export = tmp_path / "ours", tmp_path / "export"
    if existing:
        convert.save_orbax(weights, ours)
        convert.export_dit(cases.NATIVE, export, layout="native")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    monkeypatch.setattr(orbax_io._LazyLeafHandler, "serialize", disk_full)
    with pytest.raises(UserError, match="ours: cannot be written: the disk is full"):
        convert.save_orbax(weights, ours, overwrite=True)
    monkeypatch.setattr(safetensors_io.os, "fsync", disk_full)
    with pytest.raises(UserError, match="export: cannot be written: the disk is full"):
        convert.export_dit(cases.NATIVE, export, layout="native", overwrite=True)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    if existing:
        assert convert.dit_config(ours) == convert.dit_config(export)


def test_an_existing_folder_is_replaced_only_when_asked_and_only_if_it_is_ours(tmp_path):
    weights = open_weights(cases.NATIVE, WAN_DIT)

    def export(folder, **options):
        convert.export_dit(cases.NATIVE, folder, layout="native", **options)

    for write, folder in (
        (functools.partial(convert.save_orbax, weights), tmp_path / "ours"),
        (export, tmp_path / "out"),
    ):
        write(folder)
        with pytest.raises(UserError, match="already exists; pass --overwrite"):
            write(folder)
        write(folder, overwrite=True)
        home = tmp_path / f"home of {folder.name}"
        home.mkdir()
        (home / "thesis.tex").write_text("years of work")
        with pytest.raises(UserError, match="not replaced, since it holds other things"):
            write(home, overwrite=True)
        assert (home / "thesis.tex").read_text() == "years of work"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_other_weights_where_an_export_would_lie_are_not_replaced(tmp_path):
    """ComfyUI's own folder of models has the name that the export's has."""
    mine = tmp_path / "models" / "diffusion_models" / "wan2.1_t2v_1.3B_fp16.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_text("another's")
    write = functools.partial(convert.export_dit, cases.NATIVE, tmp_path / "models", layout="comfyui", overwrite=True)
    with pytest.raises(UserError, match="models: not replaced, since it holds other things"):
        write()
    mine.rename(tmp_path / "elsewhere")
    mine.parent.rmdir()
    (tmp_path / "models").rmdir()
    write()
    write()
    shutil.copy(tmp_path / "elsewhere", mine.with_name("mine.safetensors"))
    with pytest.raises(UserError, match="models: not replaced, since it holds other things"):
        write()
    assert mine.with_name("mine.safetensors").read_text() == "another's"


def test_when_a_write_fails_the_others_are_waited_for(tmp_path, monkeypatch):
    """Else they would end in tracebacks on a loop that is closed."""
    ended = []

    async def serialize(self, values, infos, args=None):
        await asyncio.sleep(0 if not ended else 0.05)
        ended.append(infos[0].name)
        if len(ended) == 1:
            disk_full()
        return []

    monkeypatch.setattr(orbax_io.ocp.type_handlers.NumpyHandler, "serialize", serialize)
    weights = open_weights(cases.NATIVE, WAN_DIT)
    with pytest.raises(UserError, match="ours: cannot be written: the disk is full"):
        convert.save_orbax(weights, tmp_path / "ours")
    assert len(ended) == len(weights.leaves)


def test_a_destination_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        convert.save_orbax(open_weights(cases.NATIVE, WAN_DIT), tmp_path / "file" / "ours")
