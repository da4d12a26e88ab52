"""Made-up lists of prompts of the right shape, and videos for them; the suites' own prompts are not ours to ship."""

import json

import numpy as np

from avd_jax.data.video import write_video
from avd_jax.evaluation.vbench.suites import VBENCH, VBENCH2


def entries(suite):
    """Return a list with as many prompts of each dimension as the suite's own; dimensions of a folder share theirs."""
    members = {}
    for name, folder in suite.folders.items():
        members.setdefault(folder, []).append(name)
    return [
        {"prompt_en": f"{folder} of prompt {number}.", "dimension": names}
        for folder, names in members.items()
        for number in range(suite.prompts[names[0]])
    ]


def write_info(folder, suite, rows=None):
    """Write such a list under the suite's own name."""
    path = folder / suite.info
    path.write_text(json.dumps(entries(suite) if rows is None else rows))
    return path


def write_noise(path, seed, *, frames=3, height=32, width=48, fps=8.0):
    """Write a small video that no other seed gives."""
    video = np.random.default_rng(seed).uniform(-1, 1, (frames, height // 8, width // 8, 3))
    write_video(path, video.repeat(8, 1).repeat(8, 2), fps=fps)


def results(suite, name, score, values):
    """Return an entry of an official result file: a result for each of the first videos of a dimension."""
    samples = suite.samples_in(suite.folders[name])
    rows = [
        {"video_path": f"x/m/{name}/{name} of prompt {i // samples}.-{i % samples}.mp4", "video_results": value}
        for i, value in enumerate(values)
    ]
    return {name: [score, rows]}


BOTH = (VBENCH, VBENCH2)
