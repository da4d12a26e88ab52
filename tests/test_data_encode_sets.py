"""Encoding into sets with stand-in networks: what is stored, skipped and resumed."""

import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest

from avd_jax.data import encode_sets, shapes_world
from avd_jax.data.atomic import only_writer
from avd_jax.data.encoding import TextEncoder, VideoEncoder
from avd_jax.data.inputs import Clip
from avd_jax.data.latents import EncodedSet, read_metadata, read_negative_prompt_embeds
from avd_jax.data.prompts import WAN_NEGATIVE_PROMPT
from avd_jax.data.set_finish import WHOLE, Part, merge
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


def counting(seen):
    """Return the VAE, noting how many clips it encodes."""
    return VideoEncoder(
        lambda video: (isinstance(video, np.ndarray) and seen.append(len(video)), pool(video))[1], "vae"
    )


def test_only_what_is_new_is_encoded(tmp_path):
    clips, seen, done, said = shape_clips(6, broken={1}), [], [], []
    how = {"text": TEXT, "fps": 16.0, **SIZE, "shard_size": 2}
    encode_sets.encode_videos(clips[:3], tmp_path / "set", vae=VAE, **how)
    corrected = Clip(clips[0].clip_id, "a corrected caption", clips[0].source, clips[0].read, {"motion": 0.5})
    listed = [*clips[3:], *clips[1:3], corrected]
    more = {"on_progress": done.append, "say": said.append}
    summary = encode_sets.encode_videos(listed, tmp_path / "set", vae=counting(seen), **how, **more)
    assert (summary.written, list(summary.skipped)) == (5, ["1.mp4@0.000"])
    assert sum(seen) == 4, "three clips and the one of the corrected caption; the one that is broken cannot be read"
    assert sum(done) == 6
    assert said[0].startswith(f"{tmp_path}/set: 5 of 6 to encode, about 1 kB on disk (")
    assert said[0].endswith(" kB for 1,000)")
    assert len(said) == 2
    assert said[1].startswith(f"{tmp_path}/set: about 0 s to go (")
    encoded = EncodedSet(tmp_path / "set", "latents")
    assert [clip["source"] for clip in encoded] == ["2.mp4", "3.mp4", "4.mp4", "5.mp4", "0.mp4"]
    assert (encoded[4]["caption"], encoded[4]["scores"]) == ("a corrected caption", {"motion": 0.5})


def test_parts_give_the_set_of_one_machine(tmp_path):
    """Each on its own disk, one of them killed in the middle; their folders are then copied into one."""
    clips, how = shape_clips(9, broken={4}), {"text": TEXT, "fps": 16.0, **SIZE, "shard_size": 2}
    encode_sets.encode_videos(clips, tmp_path / "whole", vae=VAE, **how)

    class Killed(BaseException):
        pass

    def kill(done):
        if done:
            raise Killed

    for index in range(3):
        part, folder = Part(index, 3), tmp_path / str(index)
        if index == 0:
            with pytest.raises(Killed):
                encode_sets.encode_videos(clips, folder, vae=VAE, **how, part=part, on_progress=kill)
        summary = encode_sets.encode_videos(clips, folder, vae=VAE, **how, part=part)
        assert (summary.written, len(summary.skipped), summary.finished) == (*((4, 0), (3, 0), (1, 1))[index], False)
    for index in (0, 2):
        shutil.copytree(tmp_path / str(index), tmp_path / "merged", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"2 of 5 files are missing, the first: .*-00001-of-00005; run --shard 1/3"):
        merge(tmp_path / "merged")
    with pytest.raises(UserError, match="not finished"):
        read_metadata(tmp_path / "merged")
    shutil.copytree(tmp_path / "1", tmp_path / "merged", dirs_exist_ok=True)
    summary = merge(tmp_path / "merged")
    assert (summary.written, list(summary.skipped)) == (8, ["4.mp4@0.000"])
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")
    assert merge(tmp_path / "merged") == summary
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")


def test_parts_of_one_folder_and_what_is_mixed(tmp_path):
    """On a shared disk; machines that know of each other are refused at once, others when their files are together."""
    clips, how = shape_clips(5), {"text": TEXT, "fps": 16.0, **SIZE, "shard_size": 2}
    other = VideoEncoder(pool, fingerprint="other")
    encode_sets.encode_videos(clips, tmp_path / "set", vae=VAE, **how, part=Part(0, 2))
    with pytest.raises(UserError, match="set: holds a set encoded from other weights of the VAE"):
        encode_sets.encode_videos(clips, tmp_path / "set", vae=other, **how, part=Part(1, 2))
    with pytest.raises(UserError, match=r"nothing: holds no parts of a set; run scripts/encode\.py with --shard first"):
        merge(tmp_path / "nothing")
    for changes, named in (({"vae": other}, "other weights of the VAE"), ({"fps": 8.0}, "fps 8.0, not 16.0")):
        encode_sets.encode_videos(clips, tmp_path / named, **{"vae": VAE, **how, **changes}, part=Part(1, 2))
        shutil.copytree(tmp_path / "set", tmp_path / named, dirs_exist_ok=True)
        with pytest.raises(UserError, match=f"shard-1-of-2.json: that part was encoded from {named}; encode it again"):
            merge(tmp_path / named)
        with pytest.raises(UserError, match=f"that part was encoded from {named}"):
            encode_sets.encode_videos(clips, tmp_path / named, vae=VAE, **how)
    encode_sets.encode_videos(clips[:4], tmp_path / "list", vae=VAE, **how, part=Part(1, 2))
    shutil.copytree(tmp_path / "set", tmp_path / "list", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"shard-1-of-2.json: that part was encoded from other inputs"):
        merge(tmp_path / "list")
    with only_writer(tmp_path / "set", "0-of-2"):
        encode_sets.encode_videos(clips, tmp_path / "set", vae=VAE, **how, part=Part(1, 2))
        for part in (WHOLE, Part(0, 2), Part(1, 3)):
            with pytest.raises(UserError, match="another process is writing to it"):
                encode_sets.encode_videos(clips, tmp_path / "set", vae=VAE, **how, part=part)
    encode_sets.encode_videos(clips, tmp_path / "whole", vae=VAE, **how)
    assert merge(tmp_path / "set").written == 5
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


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
        return processes.start(["-c", code, tmp_path / "killed"])

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
