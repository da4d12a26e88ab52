"""scripts/encode.py as a user runs it, with small stand-ins for the networks."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import processes
import pytest
from video_cases import Track, corners, noise, write

from avd_jax.data import shapes_world
from avd_jax.data.latents import EncodedSet, LatentsInfo, read_metadata
from avd_jax.data.video import write_video

SCRIPT = Path(__file__).parents[1] / "scripts" / "encode.py"

STAND_INS = """
import json, runpy, sys
import jax.numpy as jnp, numpy as np
from absl import flags
from flax import nnx
from avd_jax import command_line, convert
from avd_jax.errors import UserError


class Network(nnx.Module):
    def __init__(self, path, *_, **__):
        if "none" in path:
            raise UserError(f"{path}: holds no weights.")
        self.weight = nnx.Param(jnp.full((4,), 2.0 if "other" in path else 1.0))

    def __call__(self, ids, mask):
        return (ids * mask)[..., None] * self.weight[...]

    def encode(self, video, *, memory_gib):
        return video[:, ::4, ::8, ::8]


class Words:
    def __call__(self, texts):
        ids = np.zeros((len(texts), 512), np.int32)
        for i, text in enumerate(texts):
            ids[i, : len(text.split())] = [len(word) for word in text.split()]
        return ids, (ids > 0).astype(np.int32)

    def tell_what_is_cut(self, texts):
        for text in texts:
            if "long" in text:
                print(f"cut off: {text}")


convert.load_vae = convert.load_umt5 = Network
convert.load_tokenizer = lambda path: Words()
"""
RUN = STAND_INS + "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
# Many command lines in one process: what each raises, as JSON.
MESSAGES = (
    STAND_INS
    + """
script = runpy.run_path(sys.argv[1])
messages = []
for arguments in json.loads(sys.argv[2]):
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    try:
        command_line.checked(script["main"], ())(flags.FLAGS(["encode.py", *arguments]))
        messages.append("")
    except UserError as error:
        messages.append(str(error))
print(json.dumps(messages))
"""
)


def python(code, *arguments, status=0):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = processes.run(["-c", code, *arguments], env=environment)
    assert done.returncode == status, done.stderr
    return done


def encode(*arguments, status=0):
    return python(RUN, SCRIPT, *arguments, status=status)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "videos").mkdir()
    for name in ("a", "b", "nocaption"):
        write_video(tmp_path / "videos" / f"{name}.mp4", np.full((9, 32, 48, 3), 0.5), fps=16)
    write_video(tmp_path / "videos" / "short.mp4", np.zeros((3, 32, 48, 3)), fps=16)
    (tmp_path / "videos" / "zero.mp4").write_bytes(b"")
    names = ["a", "short", "gone", "zero", "b"]
    lines = [json.dumps({"file": f"{name}.mp4", "caption": f"caption of {name}"}) for name in names]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    (tmp_path / "prompts.txt").write_text("one two \nthree/four\none two\n\n“five” six seven\n")
    (tmp_path / "w").mkdir()
    return tmp_path


def test_videos_and_prompts(folder):
    size = ["--frames=9", "--fps=16", "--height=32", "--width=48", "--shard_size=2"]
    command = [f"--videos={folder}/videos", f"--captions={folder}/captions.jsonl", "--weights=w", *size]
    latents = [*command, f"--out={folder}/latents"]
    (folder / "beside").mkdir()
    for name in ("a", "b"):  # captions beside the videos, one of them too long
        shutil.copy(folder / "videos" / f"{name}.mp4", folder / "beside")
    (folder / "beside" / "a.txt").write_text("a long caption")
    commands = {
        "encode": latents,
        "again": latents,
        "other": [*latents, "--weights=other"],
        "beside": [f"--videos={folder}/beside", "--weights=w", *size, f"--out={folder}/set"],
        "prompts": [f"--prompts={folder}/prompts.txt", "--weights=w", f"--out={folder}/prompts"],
    }
    found, printed, log = run_all(commands.values())
    messages = dict(zip(commands, found, strict=True))
    assert messages.pop("other").startswith(f"{folder}/latents: holds a set encoded from other weights")
    assert set(messages.values()) == {""}
    assert f"{folder}/latents: 5 of 5 to encode, about 2.37 kB on disk" in log

    assert printed[0] == f"{folder}/latents: 2 written, 4 skipped"
    for line, (name, reason) in zip(
        printed[1:5],
        [
            ("short", "too short"),
            ("gone", "cannot be read as a video"),
            ("zero", "cannot be read as a video"),
            ("nocaption", "has no caption"),
        ],
        strict=True,
    ):
        assert f"{name}.mp4: {reason}" in line
    assert printed[5:10] == printed[:5], "again nothing is done, and the same is said"
    assert printed[10:] == [
        "cut off: a long caption",
        f"{folder}/set: 1 written, 1 skipped",
        "  skipped b.mp4: has no caption in a .txt beside it.",
        f"{folder}/prompts: 3 written, 0 skipped",
    ]
    encoded = EncodedSet(folder / "latents", "latents")
    assert [encoded[i]["clip_id"] for i in range(len(encoded))] == ["a.mp4@0.000", "b.mp4@0.000"]
    assert encoded[1]["prompt_embeds"][:, 0].tolist() == [7, 2, 1]
    np.testing.assert_allclose(encoded[0]["latents"].astype(np.float32), 0.5, atol=0.02)
    info = read_metadata(folder / "latents")
    assert isinstance(info, LatentsInfo)
    assert (info.frames, info.fps, info.height, info.width) == (9, 16.0, 32, 48)
    assert info.latents_shape == (3, 4, 6, 3)
    assert EncodedSet(folder / "set", "latents")[0]["caption"] == "a long caption"
    prompts = EncodedSet(folder / "prompts", "prompts")
    assert [prompts[i]["text"] for i in range(3)] == ["one two", "three/four", "“five” six seven"]
    assert prompts.info.text_encoder == info.text_encoder
    assert len(list((folder / "prompts").glob("prompts-train*"))) == 1


def test_a_curated_list_in_two_sizes_and_three_parts_and_then_a_longer_one(folder):
    """Rows of one file with start and end, names relative to the list; tall videos come into a set of their own."""
    write_video(folder / "videos" / "tall.mp4", np.full((20, 48, 32, 3), -0.5), fps=16)
    (folder / "curated").mkdir()
    rows = [
        *({"file": "../videos/tall.mp4", "start": start, "end": start + 0.3125} for start in (0.0, 0.3125, 0.625)),
        {"file": "../videos/a.mp4", "start": 0.25, "end": 0.5625, "scores": {"motion": {"value": 0.5}}},
        {"file": "../videos/tall.mp4", "start": 0.9, "end": 1.2},
    ]
    lines = [json.dumps(row | {"caption": f"caption {i}"}) for i, row in enumerate(rows)]
    (folder / "curated" / "captions.jsonl").write_text("\n".join(lines))
    more = {"file": "../videos/b.mp4", "start": 0.0, "end": 0.5, "caption": "more"}
    (folder / "curated" / "more.jsonl").write_text("\n".join([json.dumps(more), *lines]))
    how = ["--weights=w", "--frames=5", "--sizes=32x48,48x32", "--shard_size=1"]
    command, longer = ([f"--captions={folder}/curated/{name}.jsonl", *how] for name in ("captions", "more"))
    commands = [[*command, f"--out={folder}/whole"]]
    commands += [[*command, f"--out={folder}/parts", f"--shard={i}/3"] for i in range(3)]
    commands += [["--merge", f"--out={folder}/parts"], [*longer, f"--out={folder}/parts"]]
    messages, printed, log = run_all(commands)
    assert set(messages) == {""}
    assert printed[:4] == [
        f"{folder}/whole/32x48: 1 written, 0 skipped",
        f"{folder}/whole/48x32: 3 written, 1 skipped",
        "  skipped ../videos/tall.mp4@0.900: a clip of 5 frames at 16 fps reaches beyond its end, 1.2 s "
        f"({folder}/curated/captions.jsonl:5).",
        f"{folder}/parts/32x48: 1 written, 0 skipped; this is part 0-of-3, --merge makes one set of all",
    ]
    assert [line for line in printed if "written" in line and "part " not in line][2:] == [
        f"{folder}/parts/32x48: 1 written, 0 skipped",
        f"{folder}/parts/48x32: 3 written, 0 skipped",
        f"{folder}/parts/32x48: 2 written, 0 skipped",
        f"{folder}/parts/48x32: 3 written, 1 skipped",
    ]
    assert log.count("1 of 2 to encode") == 1
    whole, parts = (read_all(folder / name / "48x32", "latents") for name in ("whole", "parts"))
    assert [clip["clip_id"] for clip in whole] == [f"../videos/tall.mp4@{start:.3f}" for start in (0, 0.3125, 0.625)]
    assert str(whole) == str(parts)
    assert whole[0]["latents"].shape == (2, 6, 4, 3)
    clips = read_all(folder / "parts" / "32x48", "latents")
    assert [(clip["clip_id"], clip["scores"]) for clip in clips] == [
        ("../videos/a.mp4@0.250", {"motion": 0.5}),
        ("../videos/b.mp4@0.000", {}),
    ]


def test_videos_of_unusual_kinds(tmp_path):
    """One that starts late, one whose title is not UTF-8, and one that is damaged between the frames of the clip."""
    videos = tmp_path / "videos"
    videos.mkdir()
    write(videos / "late.mkv", Track(corners(), g="10", first=250))
    titled = write(videos / "titled.avi", Track(corners(), "mpeg4"), metadata={"title": "Caf\u00e9"})
    titled.write_bytes(titled.read_bytes().replace(b"\xc3\xa9", b"\xe9 "))
    damaged = write(videos / "damaged.mp4", Track(noise(), bf="0"))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 400] = bytes(400)
    damaged.write_bytes(data)
    names = ["late.mkv", "titled.avi", "damaged.mp4"]
    lines = [json.dumps({"file": name, "caption": f"caption of {name}"}) for name in names]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    command = [f"--videos={videos}", f"--captions={tmp_path}/captions.jsonl", "--weights=w", "--clips_per_video=4"]
    done = encode(*command, "--frames=5", "--fps=12.5", "--height=32", "--width=32", f"--out={tmp_path}/out")
    first, *skipped = done.stdout.splitlines()
    assert first.startswith(f"{tmp_path}/out: ")
    assert all(f"{videos}/damaged.mp4: damaged near" in line for line in skipped)
    encoded = EncodedSet(tmp_path / "out", "latents")
    sources = [encoded[i]["source"] for i in range(len(encoded))]
    assert (sources.count("late.mkv"), sources.count("titled.avi")) == (4, 4)
    assert sources.count("damaged.mp4") + len(skipped) == 4
    assert skipped


def run_all(commands):
    """Run many command lines in one process; return what each raises, what all print, and what they log."""
    done = python(MESSAGES, SCRIPT, json.dumps([[*map(str, command)] for command in commands]))
    *printed, messages = done.stdout.splitlines()
    return json.loads(messages), printed, done.stderr


def read_all(folder, kind):
    encoded = EncodedSet(folder, kind)
    return [encoded[i] for i in range(len(encoded))]


def test_the_world_of_shapes(tmp_path):
    out, again = tmp_path / "data", tmp_path / "again"
    world = ["--shapes_world", "--weights=w"]
    command = [*world, "--clips=3", "--prompt_count=4", "--shard_size=2", f"--out={out}"]
    small = ["--frames=5", "--height=32", "--width=48", "--fps=8", "--batch_size=2"]
    outline = [*world, *small, "--clips=2", "--style=outline", f"--out={tmp_path}/outline"]
    (message, _, _), printed, log = run_all(
        [command, outline, [*world, "--clips=1", "--prompt_count=0", f"--out={again}"]]
    )
    assert message == ""
    assert printed == [
        f"{out}/latents: 3 written, 0 skipped",
        f"{out}/prompts: 4 written, 0 skipped",
        f"{tmp_path}/outline/latents: 2 written, 0 skipped",
        f"{again}/latents: 1 written, 0 skipped",
    ]
    assert "7/7" in log
    assert not (tmp_path / "outline" / "prompts").exists()
    assert not (again / "prompts").exists()

    clips, info = read_all(out / "latents", "latents"), read_metadata(out / "latents")
    assert (info.frames, info.height, info.width, info.fps) == (17, 64, 64, 16.0)
    assert [clip["clip_id"] for clip in clips] == [f"shapes_world@00000{i}" for i in range(3)]
    assert [clip["caption"] for clip in clips] == [shapes_world.caption(i) for i in range(3)]
    assert clips[0]["caption"].startswith("In this video a small striped purple bar glides quickly downwards")
    drawn, _ = shapes_world.clip(2, frames=17, height=64, width=64)
    np.testing.assert_allclose(clips[2]["latents"].astype(np.float32), drawn[::4, ::8, ::8], atol=2**-8)
    prompts = read_all(out / "prompts", "prompts")
    assert [prompt["text"] for prompt in prompts] == [shapes_world.caption(i) for i in range(3, 7)]
    assert len(list((out / "latents").glob("latents-train*"))) == 2

    inked, info = read_all(tmp_path / "outline" / "latents", "latents"), read_metadata(tmp_path / "outline" / "latents")
    assert (info.latents_shape, info.fps) == ((2, 4, 6, 3), 8.0)
    assert [clip["clip_id"] for clip in inked] == ["shapes_world_outline@000000", "shapes_world_outline@000001"]
    assert inked[1]["caption"] == clips[1]["caption"]
    drawn, _ = shapes_world.clip(1, frames=5, height=32, width=48, style="outline")
    np.testing.assert_allclose(inked[1]["latents"].astype(np.float32), drawn[::4, ::8, ::8], atol=2**-8)

    # Again, with one of the files lost: only that one is made anew. With a clip less the set has one less.
    lost, *kept = sorted(out.glob("*/*-train*"))
    times, bytes_lost = [file.stat().st_mtime_ns for file in kept], lost.read_bytes()
    lost.unlink()
    messages, printed, _ = run_all([command, [*command, "--clips=2"]])
    assert messages == ["", ""]
    assert printed == [
        *(f"{out}/latents: 3 written, 0 skipped", f"{out}/prompts: 4 written, 0 skipped"),
        *(f"{out}/latents: 2 written, 0 skipped", f"{out}/prompts: 4 written, 0 skipped"),
    ]
    assert [clip["clip_id"] for clip in read_all(out / "latents", "latents")] == [
        f"shapes_world@00000{i}" for i in (0, 1)
    ]
    assert [file.stat().st_mtime_ns for file in kept] == times
    assert lost.read_bytes() == bytes_lost


def test_messages(folder):
    videos, captions = f"--videos={folder}/videos", f"--captions={folder}/captions.jsonl"
    prompts, weights, out = f"--prompts={folder}/prompts.txt", "--weights=w", f"--out={folder}/out"
    world = "--shapes_world"
    (folder / "half.json").write_text('["one",\n"two \\ud83d"]')
    (folder / "half.csv").write_text('{"file": "a.mp4", "caption": "two \\ud83d"}\n')
    (folder / "times.csv").write_text("file,caption,start,end\na.mp4,x,2,1\n")
    (folder / "late.csv").write_text("file,caption,start,end\na.mp4,x,0.5,1\n")
    (folder / "bad.jsonl").write_text('{"file": "a.mp4"}\n')
    cases = {
        (): "--weights is missing",
        (weights, out): "give either --prompts, or --videos or --captions or both.",
        (prompts, videos, captions, weights, out): "give either --prompts, or --videos or --captions or both.",
        (videos, weights, out): f"{folder}/videos: no video has a caption; give --captions",
        (
            prompts,
            weights,
            "--out=s3://bucket/x",
        ): "--out s3://bucket/x: s3:// is not supported, only local paths and",
        ("--prompts=s3://bucket/x", weights, out): "--prompts s3://bucket/x: s3:// is not supported",
        (prompts, "--weights=s3://a/b", out): "--weights s3://a/b: s3:// is not supported",
        (f"--prompts={folder}/half.json", weights, out): f"{folder}/half.json:2: the prompt is no UTF-8",
        (videos, f"--captions={folder}/half.csv", weights, out): f"{folder}/half.csv:1: the caption is no UTF-8",
        (prompts, out): "--weights is missing: Folder with the VAE",
        ("--merge",): "--out is missing",
        ("--merge", out): f"{folder}/out: holds no parts of a set; run scripts/encode.py with --shard first.",
        (prompts, weights, out, "--shard=3/3"): "--shard '3/3': write i/n, i from 0 to n - 1, such as 0/3 on the first",
        (prompts, weights, out, "--sizes=32x32"): "--sizes is for videos, and instead of --height and --width",
        (videos, captions, weights, out, "--sizes=32x32", "--width=32"): "--sizes is for videos, and instead of",
        (videos, captions, weights, out, "--sizes=32"): "--sizes '32': write HEIGHTxWIDTH with commas between",
        (
            f"--captions={folder}/times.csv",
            weights,
            out,
        ): f"{folder}/times.csv:2: 'end' is 1 s, not after the",
        (
            f"--captions={folder}/late.csv",
            weights,
            out,
        ): f"{folder}/late.csv: gives no clip; the first: a.mp4@0.5",
        (prompts, weights): "--out is missing",
        (videos, captions, weights, out, "--frames=16"): "--frames 16 is not 4n+1; try 17.",
        (videos, captions, weights, out, "--frames=0"): "--frames 0 is not 4n+1; try 1.",
        (videos, captions, weights, out, "--height=100"): "--height 100 is not a multiple of 16; try 96.",
        (videos, captions, weights, out, "--width=8"): "--width 8 is not a multiple of 16; try 16.",
        (prompts, weights, out, "more"): "'more' is not a flag",
        (f"--prompts={folder}/none.txt", weights, out): f"{folder}/none.txt: cannot be read (No such file",
        (f"--videos={folder}/none", captions, weights, out): f"{folder}/none: is not a folder of videos.",
        (videos, f"--captions={folder}/bad.jsonl", weights, out): f"{folder}/bad.jsonl:1: has no 'caption'",
        (prompts, "--weights=none", out): "none: holds no weights.",
        (world, weights, out): "--clips is missing: how many clips of --shapes_world to draw.",
        (world, prompts, weights, out, "--clips=4"): "--shapes_world needs no files: leave out --videos, --captions",
        (world, captions, weights, out, "--clips=4"): "--shapes_world needs no files",
        (prompts, weights, out, "--clips=4"): "--clips only goes with --shapes_world.",
        (videos, captions, weights, out, "--prompt_count=0"): "--prompt_count only goes with --shapes_world.",
        (weights, out, "--style=outline"): "--style only goes with --shapes_world.",
        (world, weights, out, "--clips=4", "--frames=16"): "--frames 16 is not 4n+1; try 17.",
        (world, weights, out, "--clips=4", "--width=40"): "--width 40 is not a multiple of 16; try 32.",
        (world, weights, out, "--clips=400000", "--prompt_count=100001"): "500001 clips and prompts of the world of",
    }
    found, _, _ = run_all(cases)
    for (arguments, expected), message in zip(cases.items(), found, strict=True):
        assert message.startswith(expected), (arguments, message)
        assert "\n" not in message
    assert not (folder / "out").exists()


def test_absl_reports_unknown_flags(folder):
    done = encode("--captoins=x", status=1)
    assert "Unknown command line flag 'captoins'. Did you mean: captions ?" in done.stderr
    assert "Traceback" not in done.stderr


def test_length():
    assert len(SCRIPT.read_text().splitlines()) <= 100
