"""Encoded sets: what is written is read back, interruptions cost one shard, and damage is named."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tensorflow_datasets as tfds

from avd_jax.data import latents as sets
from avd_jax.data.set_writer import SetWriter
from avd_jax.errors import UserError

INFO = sets.LatentsInfo(
    text_len=16,
    text_dim=6,
    text_encoder="aaaa",
    frames=5,
    height=16,
    width=32,
    fps=16.0,
    latents_shape=(2, 2, 4, 16),
    vae="bbbb",
)
INPUTS = [f"clip {i}" for i in range(7)]
NEGATIVE = np.ones((3, 6), ml_dtypes.bfloat16)


def record(i):
    generator = np.random.default_rng(i)
    return sets.latents_record(
        clip_id=INPUTS[i],
        caption=f"caption “{i}” with a / and ü",
        # The last bytes are zero, which a fixed-width byte string would lose.
        latents=np.concatenate([generator.standard_normal(255), [0.0]]).reshape(2, 2, 4, 16),
        prompt_embeds=generator.standard_normal((i + 1, 6)),
        fps=16.0,
        source=f"{i}.mp4",
        scores={"entropy": 0.5 * i},
    )


def write(folder, shards=None, skip=(), info=INFO, inputs=INPUTS, per_shard=3):
    writer = SetWriter(folder, info, inputs, inputs_per_shard=per_shard)
    for shard in writer.pending() if shards is None else shards:
        kept = [i for i in writer.to_encode(shard) if i not in skip]
        skipped = {INPUTS[i]: f"{INPUTS[i]}: broken" for i in writer.to_encode(shard) if i in skip}
        writer.write_shard(shard, [record(i) for i in kept], skipped)
    return writer


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def finished(tmp_path):
    summary = write(tmp_path / "set", skip={1, 4}).finish("ugly", NEGATIVE)
    assert summary.written == 5
    assert list(summary.skipped) == ["clip 1", "clip 4"]
    return tmp_path / "set"


def test_round_trip(finished):
    assert sets.read_metadata(finished) == INFO
    encoded = sets.EncodedSet(finished, "latents")
    assert len(encoded) == 5
    for found, i in zip((encoded[j] for j in range(5)), [0, 2, 3, 5, 6], strict=True):
        expected = record(i)
        assert found["latents"].dtype == found["prompt_embeds"].dtype == ml_dtypes.bfloat16
        assert found["latents"].shape == (2, 2, 4, 16)
        assert found["latents"].tobytes() == expected["latents"]
        assert found["prompt_embeds"].shape == (i + 1, 6)
        assert found["prompt_embeds"].tobytes() == expected["prompt_embeds"]
        assert {k: found[k] for k in ("clip_id", "caption", "source", "fps", "scores")} == {
            "clip_id": INPUTS[i],
            "caption": f"caption “{i}” with a / and ü",
            "source": f"{i}.mp4",
            "fps": 16.0,
            "scores": {"entropy": 0.5 * i},
        }
    assert [found["clip_id"] for found in encoded] == [INPUTS[i] for i in (0, 2, 3, 5, 6)], "a loop ends"
    assert encoded[-1]["clip_id"] == encoded[np.int64(4)]["clip_id"] == INPUTS[6]
    for index in (5, -6):
        with pytest.raises(IndexError):
            encoded[index]
    skipped = [json.loads(line) for line in (finished / "skipped.jsonl").read_text().splitlines()]
    assert skipped[0] == {"input": "clip 1", "reason": "clip 1: broken"}


def test_negative_prompt(finished):
    embeds = sets.read_negative_prompt_embeds(finished, 5)
    assert embeds.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(embeds.astype(np.float32), [[1] * 6] * 3 + [[0] * 6] * 2)
    (finished / sets.NEGATIVE_PROMPT_FILE).write_bytes(b"x")
    with pytest.raises(UserError, match="negative_prompt_embeds"):
        sets.read_negative_prompt_embeds(finished, 5)


def test_tfds_opens_the_folder_without_tensorflow(finished):
    code = (
        "import sys, tensorflow_datasets as tfds\n"
        "source = tfds.builder_from_directory(sys.argv[1]).as_data_source('train')\n"
        "assert len(source) == 5 and source[4]['clip_id'] == b'clip 6', source[4]\n"
        "from avd_jax.data.latents import EncodedSet\n"
        "EncodedSet(sys.argv[1], 'latents')[0]\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(finished)], check=True)
    info = tfds.builder_from_directory(finished).info
    assert info.metadata["height"] == 16
    assert info.splits["train"].shard_lengths == [2, 2, 1]


def test_prompts_set(tmp_path):
    info = sets.PromptsInfo(text_len=16, text_dim=6, text_encoder="aaaa")
    writer = SetWriter(tmp_path / "p", info, ["a", "b/c"], inputs_per_shard=8)
    embeds = {"a": np.full((2, 6), 0.5), "b/c": np.full((1, 6), -2.0)}
    writer.write_shard(0, [sets.prompts_record(text=t, prompt_embeds=e) for t, e in embeds.items()], {})
    writer.finish("ugly", NEGATIVE)
    assert sets.read_metadata(tmp_path / "p") == info
    found = sets.EncodedSet(tmp_path / "p", "prompts")
    assert [found[i]["text"] for i in range(2)] == ["a", "b/c"]
    np.testing.assert_array_equal(found[1]["prompt_embeds"].astype(float), embeds["b/c"])
    with pytest.raises(UserError, match="is a set of prompts, not of latents"):
        sets.EncodedSet(tmp_path / "p", "latents")


def test_padding():
    embeds = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.testing.assert_array_equal(sets.pad_prompt_embeds(embeds, 5), [[0, 1], [2, 3], [4, 5], [0, 0], [0, 0]])
    np.testing.assert_array_equal(sets.pad_prompt_embeds(embeds, 2), [[0, 1], [2, 3]])


def test_resumes_after_an_interruption_and_gives_the_same_bytes(tmp_path, finished):
    folder = tmp_path / "again"
    write(folder, shards=[0], skip={1, 4})
    # What a kill in the middle of a shard leaves: a part under a temporary name, or a manifest before its shard.
    (folder / ".latents-train.array_record-00001-of-00003.tmp").write_bytes(b"part")
    (folder / "manifest" / "00001.json").write_text('{"file_bytes": 3}')
    writer = SetWriter(folder, INFO, INPUTS, inputs_per_shard=3)
    assert writer.pending() == [1, 2]
    write(folder, skip={1, 4}).finish("ugly", NEGATIVE)
    assert contents(folder) == contents(finished)
    assert write(folder, skip={1, 4}).pending() == []


def test_unfinished_set_says_how_to_finish_it(tmp_path):
    writer = write(tmp_path / "set", shards=[0, 2])
    with pytest.raises(UserError, match=r"not finished; run scripts/encode\.py again"):
        sets.read_metadata(tmp_path / "set")
    with pytest.raises(ValueError, match=r"\[1\]"):
        writer.finish("ugly", NEGATIVE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"info": replace(INFO, height=32)}, "height 16, not 32"),
        ({"info": replace(INFO, fps=8.0)}, "fps 16.0, not 8.0"),
        ({"info": replace(INFO, vae="cccc")}, "other weights of the VAE"),
        ({"info": replace(INFO, text_encoder="cccc")}, "other weights of the text encoder"),
        ({"info": sets.PromptsInfo(16, 6, "aaaa")}, "kind latents, not prompts"),
        ({"inputs": ["clip 7", "clip 8"]}, "other inputs, none of which is among these"),
        ({"per_shard": 4}, "inputs_per_shard 3, not 4"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(tmp_path, change, message):
    write(tmp_path / "set", shards=[0])
    before = contents(tmp_path / "set")
    with pytest.raises(UserError, match=message) as caught:
        write(tmp_path / "set", shards=[], **change)
    assert "set" in str(caught.value)
    assert contents(tmp_path / "set") == before


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        write(tmp_path)
    with pytest.raises(UserError, match="nothing to encode"):
        write(tmp_path / "new", inputs=[])


def test_all_skipped(tmp_path):
    with pytest.raises(UserError, match="all 7 inputs were skipped; the first: clip 0: broken"):
        write(tmp_path / "set", skip=set(range(7))).finish("ugly", NEGATIVE)
    with pytest.raises(UserError, match="not finished"):
        sets.read_metadata(tmp_path / "set")


def test_an_empty_shard_is_fine(tmp_path):
    write(tmp_path / "set", skip={3, 4, 5}).finish("ugly", NEGATIVE)
    encoded = sets.EncodedSet(tmp_path / "set", "latents")
    assert [encoded[i]["clip_id"] for i in range(4)] == ["clip 0", "clip 1", "clip 2", "clip 6"]


SHARD = "latents-train.array_record-00001-of-00003"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (SHARD, None, f"{SHARD}: is missing"),
        (SHARD, b"", f"{SHARD}: is cut short"),
        ("manifest/00002.json", None, r"00002\.json: is missing"),
        ("manifest/00002.json", b"{", r"00002\.json: cannot be read"),
        ("metadata.json", None, "holds no encoded set"),
        ("metadata.json", b"[", r"metadata\.json: cannot be read"),
        ("metadata.json", b'{"schema_version": "1.0.0", "kind": "latents"}', "is damaged"),
        ("metadata.json", b'{"schema_version": "9.0.0"}', "has schema 9.0.0, not 1.0.0"),
        ("dataset_info.json", None, "not finished"),
        ("dataset_info.json", b"{", "cannot be opened"),
        ("features.json", None, "cannot be opened"),
    ],
)
def test_damage_is_named(finished, name, data, message):
    path = finished / name
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        sets.EncodedSet(finished, "latents")
    assert "\n" not in str(caught.value)
    assert "set" in str(caught.value)


def test_flipped_bytes_are_found_when_read(finished):
    path = finished / SHARD
    data = bytearray(path.read_bytes())
    data[300:360] = bytes(60)  # inside the first record, behind the file's own header
    path.write_bytes(data)
    encoded = sets.EncodedSet(finished, "latents")
    assert encoded[0]["clip_id"] == "clip 0"
    with pytest.raises(UserError, match=r"record 2 is damaged.*encode the set again"):
        encoded[2]


def test_a_missing_or_damaged_shard_is_written_anew(finished):
    before = contents(finished)
    (finished / SHARD).write_bytes(b"cut")
    writer = write(finished, skip={1, 4})
    writer.finish("ugly", NEGATIVE)
    assert contents(finished) == before


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: holds no encoded set.*scripts/encode\.py"):
        sets.read_metadata(tmp_path / "nowhere")


def test_negative_prompt_text_is_kept(finished):
    with safetensors.safe_open(finished / sets.NEGATIVE_PROMPT_FILE, "numpy") as file:
        assert file.metadata() == {"text": "ugly"}


def test_others_may_read_every_file(finished):
    """Files follow the user's umask; hosts of a pod often run as other users."""
    modes = {path.stat().st_mode for path in finished.rglob("*") if path.is_file()}
    (finished / "plain").touch()
    assert modes == {(finished / "plain").stat().st_mode}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("write() failed: No space left on device; at byte 3"), "full: the disk is full; free some space"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "full: the disk is full; free some space"),
        (OSError(errno.EIO, "it broke"), r"full: cannot be written \(it broke\); give another folder"),
    ],
)
def test_a_full_disk_keeps_the_shards_before(tmp_path, finished, monkeypatch, error, message):
    write(tmp_path / "full", shards=[0], skip={1, 4})

    class Writer:
        def __init__(self, *args):
            pass

        def write(self, record):
            raise error

    writer = SetWriter(tmp_path / "full", INFO, INPUTS, inputs_per_shard=3)
    monkeypatch.setattr("avd_jax.data.set_writer.ArrayRecordWriter", Writer)
    with pytest.raises(UserError, match=message) as raised:
        writer.write_shard(1, [record(3)], {})
    assert "\n" not in str(raised.value)
    monkeypatch.undo()
    write(tmp_path / "full", skip={1, 4}).finish("ugly", NEGATIVE)
    assert contents(tmp_path / "full") == contents(finished)


def test_other_errors_of_the_writer_are_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    writer = SetWriter(tmp_path / "set", INFO, INPUTS, inputs_per_shard=3)
    monkeypatch.setattr("avd_jax.data.set_writer.ArrayRecordWriter", lambda *args: 0)
    with pytest.raises(AttributeError):
        writer.write_shard(0, [], {})


def test_a_set_on_another_machine_is_refused_by_its_scheme(tmp_path, monkeypatch):
    for call in (sets.read_metadata, sets.set_fingerprint, lambda path: sets.EncodedSet(path, "latents")):
        with pytest.raises(UserError, match="s3:// is not supported"):
            call("s3://bucket/set")
    monkeypatch.setenv("HOME", str(tmp_path))
    write("~/set").finish("ugly", NEGATIVE)
    assert sets.read_metadata("~/set") == sets.read_metadata(tmp_path / "set")
