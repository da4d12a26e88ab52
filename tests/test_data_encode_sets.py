"""Encoding into sets with stand-in networks: what is stored, skipped and resumed."""

import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.data import encode_sets, shapes_world
from avd_jax.data.atomic import only_writer
from avd_jax.data.encoding import TextEncoder, VideoEncoder
from avd_jax.data.inputs import Clip
from avd_jax.data.latents import EncodedSet, read_metadata, read_negative_prompt_embeds
from avd_jax.data.prompts import WAN_NEGATIVE_PROMPT
from avd_jax.errors import UserError

SIZE = {"frames": 5, "height": 16, "width": 32}


def embed(texts):
    """One row a word: the number of its letters and of its vowels."""
    return [np.array([[len(w), sum(c in "aeiou" for c in w)] for w in t.split()], np.float32) for t in texts]


def pool(video):
    """Average over 8 x 8 pixels of every 4th frame, in four channels."""
    video = video[:, ::4]
    pooled = video.reshape(*video.shape[:2], video.shape[2] // 8, 8, video.shape[3] // 8, 8, 3).mean((3, 5))
    return jnp.concatenate([pooled, pooled[..., :1]], -1)


TEXT = TextEncoder(embed, text_len=512, fingerprint="text")
VAE = VideoEncoder(pool, fingerprint="vae")


def shape_clips(count, broken=()):
    def reader(i):
        def read():
            if i in broken:
                raise UserError(f"{i}.mp4: broken")
            return shapes_world.clip(i, **SIZE)[0]

        return read

    return [Clip(f"{i}.mp4@0.000", shapes_world.caption(i), f"{i}.mp4", reader(i)) for i in range(count)]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_videos(tmp_path, batch_size):
    done = []
    summary = encode_sets.encode_videos(
        shape_clips(8, broken={0, 5}),
        tmp_path / "set",
        vae=VAE,
        text=TEXT,
        fps=16.0,
        **SIZE,
        batch_size=batch_size,
        text_batch_size=2,
        shard_size=5,
        on_progress=done.append,
    )
    assert summary.written == 6
    assert summary.skipped == {"0.mp4@0.000": "0.mp4: broken", "5.mp4@0.000": "5.mp4: broken"}
    assert sum(done) == 8
    encoded = EncodedSet(tmp_path / "set", "latents")
    assert encoded.info.latents_shape == (2, 2, 4, 4)
    assert (encoded.info.text_dim, encoded.info.text_encoder, encoded.info.vae) == (2, "text", "vae")
    for found, i in zip((encoded[j] for j in range(6)), [1, 2, 3, 4, 6, 7], strict=True):
        video, caption = shapes_world.clip(i, **SIZE)
        assert (found["clip_id"], found["source"], found["caption"]) == (f"{i}.mp4@0.000", f"{i}.mp4", caption)
        # bfloat16 keeps 8 bits.
        np.testing.assert_allclose(found["latents"].astype(np.float32), pool(video[None])[0], rtol=2**-8)
        np.testing.assert_array_equal(found["prompt_embeds"].astype(np.float32), embed([caption])[0])
    negative = read_negative_prompt_embeds(tmp_path / "set", 512)
    np.testing.assert_array_equal(negative[: len(WAN_NEGATIVE_PROMPT.split())], embed([WAN_NEGATIVE_PROMPT])[0])


def test_prompts_are_encoded_once_in_order(tmp_path):
    prompts = ["one two", "b", "one two", "c d e", "b"]
    summary = encode_sets.encode_prompts(prompts, tmp_path / "set", text=TEXT, text_batch_size=2, shard_size=2)
    assert summary.written == 3
    encoded = EncodedSet(tmp_path / "set", "prompts")
    assert [encoded[i]["text"] for i in range(3)] == ["one two", "b", "c d e"]
    assert [len(encoded[i]["prompt_embeds"]) for i in range(3)] == [2, 1, 3]


def test_networks_see_one_shape_only(tmp_path):
    seen = set()

    def counted(texts):
        seen.add(len(texts))
        return embed(texts)

    text = TextEncoder(counted, text_len=512, fingerprint="text")
    shapes = set()
    vae = VideoEncoder(lambda video: (shapes.add(video.shape), pool(video))[1], fingerprint="vae")
    clips = shape_clips(7, broken={1})
    kwargs = {"batch_size": 2, "text_batch_size": 3, "shard_size": 3}
    encode_sets.encode_videos(clips, tmp_path / "set", vae=vae, text=text, fps=16.0, **SIZE, **kwargs)
    assert seen == {3}
    assert shapes == {(2, 5, 16, 32, 3)}


def test_values_that_are_not_finite_are_skipped(tmp_path):
    vae = VideoEncoder(lambda video: jnp.log(jnp.maximum(video[:, ::4, ::8, ::8].mean(-1, keepdims=True), 0)), "x")
    clips = [
        Clip("dark", "a", "dark", lambda: np.full((5, 16, 32, 3), -1, np.float32)),
        Clip("light", "b", "light", lambda: np.full((5, 16, 32, 3), 1, np.float32)),
    ]
    summary = encode_sets.encode_videos(clips, tmp_path / "set", vae=vae, text=TEXT, fps=16.0, **SIZE)
    assert summary.written == 1
    assert summary.skipped == {"dark": "dark: its latents or embeddings are not finite."}


def test_a_corrected_caption_is_another_set(tmp_path):
    clips = shape_clips(2)
    encode_sets.encode_videos(clips, tmp_path / "set", vae=VAE, text=TEXT, fps=16.0, **SIZE)
    other = [clips[0], Clip(clips[1].clip_id, "a corrected caption", clips[1].source, clips[1].read)]
    with pytest.raises(UserError, match="other inputs"):
        encode_sets.encode_videos(other, tmp_path / "set", vae=VAE, text=TEXT, fps=16.0, **SIZE)


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
import test_data_encode_sets as t
slow = t.VideoEncoder(lambda v: (time.sleep({delay}), t.pool(v))[1], fingerprint="vae")
t.encode_sets.encode_videos(t.shape_clips(9, broken={{4}}), sys.argv[1], vae=slow, text=t.TEXT, fps=16.0, **t.SIZE,
                         shard_size=2)
"""


def test_killed_and_run_again_gives_the_same_set(tmp_path):
    """SIGKILL as soon as each of the first shards stands, then to the end."""

    def start(delay):
        code = KILLED.format(tests=os.path.dirname(__file__), delay=delay)
        return subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "killed")])

    for shard in (0, 2):
        process = start(0.2)
        while process.poll() is None and not list((tmp_path / "killed").glob(f"latents-train.*-{shard:05d}-of-*")):
            time.sleep(0.01)
        assert process.poll() is None, "finished before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    with pytest.raises(UserError, match="not finished"):
        read_metadata(tmp_path / "killed")
    kept = (tmp_path / "killed" / "latents-train.array_record-00000-of-00005").stat().st_mtime_ns
    assert start(0).wait() == 0
    assert (tmp_path / "killed" / "latents-train.array_record-00000-of-00005").stat().st_mtime_ns == kept

    encode_sets.encode_videos(
        shape_clips(9, broken={4}), tmp_path / "whole", vae=VAE, text=TEXT, fps=16.0, **SIZE, shard_size=2
    )
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_shapes_world(tmp_path):
    kwargs = {"vae": VAE, "text": TEXT, "clips": 5, "prompts": 7, "fps": 16.0, **SIZE}
    done = []
    summaries = encode_sets.encode_shapes_world(tmp_path, **kwargs, on_progress=done.append)
    latents_dir, prompts_dir = tmp_path / "latents", tmp_path / "prompts"
    assert {folder: summary.written for folder, summary in summaries.items()} == {latents_dir: 5, prompts_dir: 7}
    assert sum(done) == 12
    latents, prompts = EncodedSet(latents_dir, "latents"), EncodedSet(prompts_dir, "prompts")
    assert [latents[i]["clip_id"] for i in range(2)] == ["shapes_world@000000", "shapes_world@000001"]
    assert [latents[i]["caption"] for i in range(len(latents))] == [shapes_world.caption(i) for i in range(5)]
    assert [prompts[i]["text"] for i in range(len(prompts))] == [shapes_world.caption(i) for i in range(5, 12)]
    before = contents(tmp_path)
    encode_sets.encode_shapes_world(tmp_path, **kwargs)
    assert contents(tmp_path) == before


def test_shapes_world_in_another_style_and_without_prompts(tmp_path):
    kwargs = {"vae": VAE, "text": TEXT, "clips": 3, "prompts": 0, "fps": 16.0, **SIZE, "style": "outline"}
    assert list(encode_sets.encode_shapes_world(tmp_path, **kwargs, batch_size=2, shard_size=2)) == [
        tmp_path / "latents"
    ]
    assert not (tmp_path / "prompts").exists()
    latents = EncodedSet(tmp_path / "latents", "latents")
    assert [latents[i]["clip_id"] for i in range(3)] == [f"shapes_world_outline@00000{i}" for i in range(3)]
    drawn, caption = shapes_world.clip(2, **SIZE, style="outline")
    assert (latents[2]["caption"], latents[2]["source"]) == (caption, "shapes_world_outline")
    np.testing.assert_allclose(latents[2]["latents"].astype(np.float32), pool(drawn[None])[0], rtol=2**-8)


LOCKED = "import sys, time; from pathlib import Path; from avd_jax.data.atomic import only_writer\n"
LOCKED += "with only_writer(Path(sys.argv[1])): print(flush=True); time.sleep(600)"


def test_one_process_writes_to_a_folder_at_a_time(tmp_path):
    folder = tmp_path / "set"
    other = subprocess.Popen([sys.executable, "-c", LOCKED, str(folder)], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(UserError, match="set: another process is writing to it; wait for it"):
            encode_sets.encode_prompts(["a"], folder, text=TEXT)
        with pytest.raises(UserError, match="another process is writing to it"):
            encode_sets.encode_videos(shape_clips(1), folder, vae=VAE, text=TEXT, fps=16.0, **SIZE)
        assert [path.name for path in folder.iterdir()] == [".lock"]
    finally:
        other.kill()
        other.wait()
    assert encode_sets.encode_prompts(["a"], folder, text=TEXT).written == 1, "a killed process keeps nobody out"
    assert not (folder / ".lock").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/set: cannot be written \(Not a directory\); give another"):
        encode_sets.encode_prompts(["a"], tmp_path / "file" / "set", text=TEXT)
    with pytest.raises(UserError, match="there is nothing to encode"):
        encode_sets.encode_prompts([], tmp_path / "none", text=TEXT)
    assert not (tmp_path / "none").exists()
    with only_writer(tmp_path / "kept"):
        (tmp_path / "kept" / "x").write_text("")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["x"]


def test_a_size_that_does_not_fit_is_one_line(tmp_path):
    def exhausted(video):
        if not isinstance(video, np.ndarray):
            return pool(video)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 274877906944 bytes.")

    vae = VideoEncoder(exhausted, fingerprint="vae")
    with pytest.raises(UserError, match="clips of 5x16x32, 1 at once: does not fit into the memory of 1 x cpu"):
        encode_sets.encode_videos(shape_clips(1), tmp_path / "set", vae=vae, text=TEXT, fps=16.0, **SIZE)
