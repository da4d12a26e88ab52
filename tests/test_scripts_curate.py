"""scripts/curate.py as a user runs it, on small videos of its own."""

import json
from pathlib import Path

from test_scripts_generate import python
from video_cases import Track, corners, noise, write

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "curate.py"
# Several command lines in one process, since it takes seconds to start one; prints the message of each.
RUN = """
import json, runpy, sys
from absl import flags
from avd_jax.errors import UserError
from avd_jax.fields import flags_parser

script = runpy.run_path(sys.argv[1])
script["command_line"]._define_config(lambda config: {})  # as run_with_config does
messages = []
for arguments in json.loads(sys.argv[2]):
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    try:
        sys.argv = ["curate.py", *arguments]  # where a config looks for what is to be set
        flags_parser(lambda path: script["settings"].FIELDS)(sys.argv)
        script["curate"](flags.FLAGS.config)
        messages.append("")
    except UserError as error:
        messages.append(str(error))
print(json.dumps(messages))
"""


def test_from_videos_to_captions_and_what_is_wrong_is_one_line(tmp_path):
    videos = tmp_path / "videos"
    (videos / "sub").mkdir(parents=True)
    write(videos / "a.mp4", Track(noise(60)))
    write(videos / "sub" / "b.mp4", Track(corners(20)))
    (videos / "c.mp4").write_bytes((videos / "a.mp4").read_bytes()[:500])
    (videos / "a.txt").write_text("Noise that moves.")
    (tmp_path / "bad.jsonl").write_text(f'{{"file": "gone.mp4"}}\n{{"file": "{videos / "c.mp4"}"}}\n')
    shared = ["--config", str(ROOT / "configs" / "curation.py"), "--out", str(tmp_path / "out"), "--workers", "2"]
    here = ["--videos", str(videos)]
    small = [f"--config.select.{name}=96" for name in ("width", "height")]
    small += ["--config.analysis.frames=17", "--config.analysis.fps=8", "--stages", "resolution,sharpness,caption"]
    cases = {
        (*here, "--config.select.color=1"): "config.select.color does not exist (did you mean 'select.colour'?)",
        (*here, "--stages", "motio"): "--stages: there is no stage 'motio' (did you mean 'motion'?); take of length,",
        (*here, "--beam_args=--x"): "--beam_args: only goes with --runner beam",
        (*here, "--config.select.motion=-1"): "config.select.motion=-1.0 must be 0 or a positive number",
        ("--videos", str(tmp_path / "nowhere")): "nowhere: there is no such folder",
        ("--videos", str(tmp_path / "bad.jsonl")): "bad.jsonl: none of its 2 videos can be read",
        (*here, *small): "",
    }
    done = python("-c", RUN, SCRIPT, json.dumps([[*shared, *arguments] for arguments in cases]))
    messages = json.loads(done.stdout.splitlines()[-1])
    for message, expected in zip(messages, cases.values(), strict=True):
        assert expected in message
        assert bool(expected) == bool(message), message
        assert "\n" not in message
    out = tmp_path / "out"
    lines = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert set(lines[0].pop("scores")) >= {"colour", "sharpness", "motion"}
    assert lines == [{"file": "../videos/a.mp4", "start": 0.0, "end": 2.125, "caption": "Noise that moves."}]
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["videos"], summary["readable"]) == (3, 2)
    assert "  left out c.mp4: cannot be read as a video" in done.stdout
    assert str(out / "report.html") in done.stdout.splitlines()
    assert "data:image/jpeg;base64," in (out / "report.html").read_text()
