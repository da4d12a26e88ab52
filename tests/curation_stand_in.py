"""Videos that say themselves what an analysis finds in them, and a stand-in for it that believes them."""

import json
import os
import random
import time
from pathlib import Path

FAST = {"seconds": 30.0, "memory_gib": 4.0}


def scores(*, colour=2.0, sharpness=100.0, motion=1.0, hashes=None, **further):
    values = {"colour": colour, "sharpness": sharpness, "motion": motion, **further}
    found = {name: {"value": value, "method": "stand-in", "size": [854, 480]} for name, value in values.items()}
    return found | {"hash": {"value": hashes, "method": "stand-in"}} if hashes else found


def clip(start=0.0, *, seconds=5.0625, too_short=False, **values):
    entry = {"start": start, "end": start + seconds, "frames": 81, "fps": 16.0, "too_short": too_short}
    return entry | ({} if too_short else {"scores": scores(**values)})


def random_hashes(seed, flipped=0):
    """Return the hashes of 8 frames, the same for a seed but for some bits of each."""
    draw = random.Random(seed)
    return [f"{draw.getrandbits(64) ^ (1 << flipped) - 1:016x}" for _ in range(8)]


def found(*clips, size=(1280, 720), error=None):
    video = {"width": size[0], "height": size[1], "fps": 25.0, "seconds": 60.0, "codec": "h264"}
    return {"error": error, "video": video, "cuts": [], "cuts_method": {}, "scenes": [], "clips": list(clips)}


def write(folder, **videos):
    """Write videos, name -> what is found in it or a word that says what it does to a process."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in videos.items():
        (folder / f"{name}.mp4").write_text(json.dumps(content))
    return folder


def analyse(path, settings):
    """Stand in for `analysis.analyse`, at the speed that AVD_TEST_SLOWNESS says; counts its calls beside the video."""
    content = json.loads(Path(path).read_text())
    with open(f"{path}.calls", "a") as calls:
        calls.write(".")
    time.sleep(float(os.environ.get("AVD_TEST_SLOWNESS", "0")))
    if content == "crash":
        os.kill(os.getpid(), 11)
    if content == "hang":
        time.sleep(600)
    if content == "memory":
        bytearray(10 * 2**30)
    if content == "raise":
        raise KeyError("codec")
    print("a library says something")
    return content


def calls(folder):
    """Return name of a video -> how often it has been analysed."""
    return {path.name.partition(".")[0]: len(path.read_text()) for path in folder.glob("*.calls")}
