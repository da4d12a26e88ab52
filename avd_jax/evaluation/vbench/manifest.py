"""manifest.json of an export: all that made its videos, and the official tool's commands for them; run.sh.

OUT/manifest.json  run.sh
OUT/videos/MODEL/FOLDER/PROMPT-INDEX.mp4     what the official tool reads: videos and nothing else
OUT/records/MODEL/FOLDER/PROMPT-INDEX.json   how each was made
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from avd_jax.data.atomic import write_text
from avd_jax.errors import UserError
from avd_jax.evaluation.vbench.check import Shape
from avd_jax.evaluation.vbench.suites import SUITES, Suite

NAME = "manifest.json"
# What may not change between the parts of an export, and what to call it.
FIXED = {
    "suite": "--suite",
    "model": "--name",
    "seed": "--seed",
    "list": "list of --info",
    "prompt_file": "--prompt_file or --prompt_order",
    "settings_digest": "setting, or other weights",
}

_SCRIPT = """\
#!/bin/bash
# Scores these videos with {title} itself, in an environment of its own: {environment}
# usage: VBENCH=/path/to/the/clone/of/Vchitect/VBench bash run.sh
# then:  python scripts/vbench.py score --suite {name} --results {results}
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "${{VBENCH:?name the clone of https://github.com/Vchitect/VBench}}"{subfolder}
"""
_ENVIRONMENTS = {
    "vbench": "Python 3.10, torch 2,\n# transformers 4.33.2, numpy below 2, detectron2 installed before vbench. "
    "One GPU: with several,\n# subject_consistency is another mean.",
    "vbench2": "Python 3.10, torch 2.5.1\n# with CUDA 11.8 or 12.1, flash-attn 2.7.2, mmcv 2.2.0.",
}


def videos_folder(out: Path, model: str) -> Path:
    """Return where the videos of an export lie; the official tool takes the model's name from the path."""
    return out / "videos" / model


def commands(suite: Suite, model: str, limits: Mapping[str, int | None]) -> list[str]:
    """Return the official tool's command lines for the folders of an export; `$here` is the export."""
    lines = []
    for dimension, folder in suite.folders.items():
        if folder not in limits:
            continue
        videos, results = f"videos/{model}/{folder}", "results"
        if dimension == "temporal_flickering":  # it wants still videos only
            lines.append(f"python static_filter.py --videos_path {_here(videos)} --result_path {_here('filtered')}")
            videos = "filtered/filtered_videos"
        if suite.name == "vbench2":  # where its cal_final_score.py finds them
            results = f"results/{dimension}"
        where = f"--videos_path {_here(videos)} --output_path {_here(results)}"
        lines.append(f"python evaluate.py --dimension {dimension} {where}")
    return lines


def write_script(out: Path, suite: Suite, lines: list[str]) -> None:
    """Write run.sh."""
    text = _SCRIPT.format(
        title=suite.title,
        name=suite.name,
        environment=_ENVIRONMENTS[suite.name],
        results=shlex.quote(str(out / "results")),
        subfolder="/VBench-2.0" if suite.name == "vbench2" else "",
    )
    write_text(out / "run.sh", text + "\n".join(lines) + "\n")


def read(out: Path) -> dict | None:
    """Return the manifest of an export, None where there is none (UserError for a damaged one)."""
    path = out / NAME
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        shape_of(manifest)
        known = manifest["suite"] in SUITES and all(key in manifest for key in FIXED)
        known &= isinstance(manifest["prompts"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise UserError(f"{path}: is damaged, or no manifest of an export; restore it, or give another folder")
    return manifest


def continued(out: Path, manifest: Mapping) -> dict:
    """Return a manifest together with what an export into the same folder has made before.

    Raises:
      UserError: that had another suite, list, seed, model or other settings.
    """
    before = read(out)
    if before is None:
        return dict(manifest)
    for key, name in FIXED.items():
        if _identity(before[key]) != _identity(manifest[key]):
            told = isinstance(manifest[key], str | int) and key != "settings_digest"
            what = f"{name} {before[key]}, not {manifest[key]}" if told else f"another {name}"
            raise UserError(f"{out}: was exported with {what}; give another --out")
    prompts = dict(before["prompts"])
    for folder, limit in manifest["prompts"].items():
        limits = (limit, prompts.get(folder, 0))
        prompts[folder] = None if None in limits else max(limits)
    return {**before, **manifest, "prompts": prompts}


def shape_of(manifest: Mapping) -> Shape:
    """Return what the videos of an export are."""
    settings = manifest["settings"]
    height, width = (settings[side] + settings[side] % 2 for side in ("height", "width"))  # as H.264 wants them
    return Shape(settings["frames"], height, width, round(float(settings["fps"]), 3))


def export_of(videos: Path) -> tuple[Path, dict | None]:
    """Return the folder of videos and the manifest that belong to what a user names: an export, or its videos."""
    manifest = read(videos)
    if manifest is not None:
        return videos_folder(videos, manifest["model"]), manifest
    above = videos.absolute().parent.parent
    manifest = read(above)
    if manifest is not None and videos_folder(above, manifest["model"]) == videos.absolute():
        return videos, manifest
    return videos, None


def _identity(value: object) -> object:
    """Return what tells a value of a manifest from another; files are told by what is in them, wherever they lie."""
    return value.get("digest") if isinstance(value, dict) else value


def _here(path: str) -> str:
    return f'"$here"/{shlex.quote(path)}'
