"""Dimensions of VBench measured here: videos and a user's weights to result files as the official tool writes them.

OUT/DIMENSION_eval_results.json  {DIMENSION: [score, [{"video_path", "video_results", ...}, ...]]}
OUT/measured.json                what they were measured with, what was skipped and why, what the static filter kept
OUT/videos.jsonl                 a line for each video that is measured, so that the same command resumes

What is not the official figure is in no result file, only in measured.json.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp

from avd_jax.convert.aesthetic_head import LINEAR, AestheticHead
from avd_jax.convert.vision_folder import checked_folder, find, find_raft
from avd_jax.convert.weights import Weights, load_module
from avd_jax.data.atomic import only_writer, write_text
from avd_jax.errors import UserError
from avd_jax.evaluation.vbench import measures, networks
from avd_jax.evaluation.vbench.check import is_flat
from avd_jax.evaluation.vbench.measures import Clip, Row
from avd_jax.evaluation.vbench.suites import Info, Suite
from avd_jax.evaluation.vbench.videos import Video, wanted

DINO, CLIP_B, CLIP_L = "DINO ViT-B/16", "CLIP ViT-B/32", "CLIP ViT-L/14"
RAFT, HEAD = "RAFT (raft-things)", LINEAR
NEEDED = {
    "temporal_flickering": (RAFT,),  # for the static filter
    "subject_consistency": (DINO,),
    "background_consistency": (CLIP_B,),
    "aesthetic_quality": (CLIP_L, HEAD),
    "dynamic_degree": (RAFT,),
}
STATIC, UNFILTERED = "static filter", "temporal_flickering without the static filter"
METHODS = {
    "temporal_flickering": "of the first 5 videos of a prompt that the static filter keeps",
    "subject_consistency": "of all frames; shorter side 224, bilinear",
    "background_consistency": "of all frames; 224 x 224 in the centre, bicubic",
    "aesthetic_quality": "of all frames; 224 x 224 in the centre, bicubic",
    "dynamic_degree": f"at 8 frames a second; {networks.STEPS} steps of the flow",
}


class Models:
    """The models of a folder; each is read when a dimension first needs it.

    Attributes:
      there: name -> what identifies it, its file and size.
      head: the linear aesthetic head, or None.
    """

    def __init__(self, folder: str | None):
        self.folder = folder
        self._weights: dict[str, Weights] = {}
        self.there: dict[str, str] = {}
        self.head: AestheticHead | None = None
        if folder is None:
            return
        place = checked_folder(folder)
        found = find(place)
        self._weights = dict(found.vits)
        self._damaged = dict.fromkeys((DINO, CLIP_B, CLIP_L, HEAD), found.damaged)
        try:
            flow = find_raft(place)
        except UserError as error:
            self._damaged[RAFT] = [error]
        else:
            self._weights |= {} if flow is None else {RAFT: flow}
        for name, weights in self._weights.items():
            file = weights.files[0]
            self.there[name] = f"{file.name} ({sum(file.stat().st_size for file in weights.files)} bytes)"
        width = found.vits[CLIP_L].config.feature_dim if CLIP_L in found.vits else None
        self.head = next((head for head in found.heads if head.name == LINEAR and len(head.weight) == width), None)
        if self.head is not None:
            digest = hashlib.sha256(self.head.weight.tobytes()).hexdigest()[:8]
            self.there[HEAD] = f"{self.head.file} ({digest})"

    def lacking(self, dimension: str) -> str | None:
        """Return why a dimension cannot be measured, or None."""
        missing = [name for name in NEEDED[dimension] if name not in self.there]
        if not missing:
            return None
        if self.folder is None:
            return f"needs {' and '.join(missing)}; give --models, a folder with the weights"
        damaged = [str(error) for name in missing for error in self._damaged.get(name, ())]
        return f"needs {' and '.join(missing)}, not in {self.folder}" + (f" ({damaged[0]})" if damaged else "")

    def used(self, what: str) -> list[str]:
        """Return what identifies the models that a row is measured with."""
        needed = {STATIC: (RAFT,), UNFILTERED: (), "temporal_flickering": ()}.get(what, NEEDED.get(what, ()))
        return [f"{name}: {self.there[name]}" for name in needed]

    @cached_property
    def flow(self) -> measures.FlowOf:
        """RAFT."""
        return networks.flow_of(self._module(RAFT))

    @cached_property
    def dino(self) -> measures.FeaturesOf:
        """DINO's features."""
        return networks.features_of(self._module(DINO))

    @cached_property
    def clip_b(self) -> measures.FeaturesOf:
        """CLIP ViT-B/32's features."""
        return networks.features_of(self._module(CLIP_B))

    @cached_property
    def clip_l(self) -> measures.FeaturesOf:
        """CLIP ViT-L/14's features."""
        return networks.features_of(self._module(CLIP_L))

    def _module(self, name: str):
        return load_module(self._weights[name], jnp.float32)


FUNCTIONS: dict[str, Callable[[Clip, Models], Row]] = {
    STATIC: lambda clip, models: {"static": measures.is_static(clip, models.flow)},
    UNFILTERED: lambda clip, models: measures.flickering(clip),
    "temporal_flickering": lambda clip, models: measures.flickering(clip),
    "subject_consistency": lambda clip, models: measures.consistency(clip, models.dino),
    "background_consistency": lambda clip, models: measures.consistency(clip, models.clip_b),
    "aesthetic_quality": lambda clip, models: measures.aesthetic_quality(
        clip, models.clip_l, weight=models.head.weight, bias=models.head.bias
    ),
    "dynamic_degree": lambda clip, models: measures.dynamic_degree(clip, models.flow),
}


@dataclass(frozen=True)
class Figure:
    """A score, of so many videos of those that there should be."""

    score: float
    videos: int
    expected: int


@dataclass
class Report:
    """What came out.

    Attributes:
      dimensions: official figures.
      other: figures that are not.
      skipped: dimension -> why.
      notes: what else there is to say, a line each.
      kept: prompt -> names of the videos that the static filter keeps.
    """

    dimensions: dict[str, Figure] = field(default_factory=dict)
    other: dict[str, Figure] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kept: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What is to be measured.

    Attributes:
      folder: with the suite's folders in it, or all videos in one.
      suite: VBench.
      info: its list of prompts.
      limits: folder -> of how many prompts, see `wanted`.
      models: the weights that there are.
      out: folder for the results.
    """

    folder: Path
    suite: Suite
    info: Info
    limits: Mapping[str, int | None]
    models: Models
    out: Path

    def videos(self, dimension: str) -> dict[Path, Video]:
        """Return the files that a dimension looks at, whether they are there or not."""
        name = self.suite.folders[dimension]
        folder = self.folder if is_flat(self.folder, self.suite) else self.folder / name
        videos = wanted(self.suite, self.info, {name: self.limits.get(name)})
        return {folder / v.name: v for v in videos if dimension in self.info.rows[v.row].dimensions}


Progress = Callable[[Sequence, str], Iterable]


def measure(task: Task, dimensions: Iterable[str], *, progress: Progress = lambda items, what: items) -> Report:
    """Measure dimensions of VBench and write their result files.

    Args:
      task: on which videos, with what.
      dimensions: which; others than those of NEEDED are skipped.
      progress: wraps what a stage goes through, to show how far it is.

    Raises:
      UserError: a video or a model is damaged, or the folder cannot be written; what is measured stays measured.
    """
    if not task.folder.is_dir():
        raise UserError(f"--videos {task.folder}: there is no such folder")
    report = Report()
    with only_writer(task.out):
        log = _Log(task.out / "videos.jsonl", task.models)
        for name in dimensions:
            if name not in NEEDED:
                report.skipped[name] = "is not measured here; the official tool does"
                continue
            videos = task.videos(name)
            there = {file: video for file, video in videos.items() if file.is_file()}
            if not there:
                report.skipped[name] = f"none of its {len(videos)} videos is in {task.folder}"
                continue
            if len(there) < len(videos):
                report.notes.append(f"{name}: {len(videos) - len(there)} of its {len(videos)} videos are not there")
            why = task.models.lacking(name)
            if why:
                report.skipped[name] = why
                if name == "temporal_flickering":
                    rows = [log.row(UNFILTERED, file) for file in progress(list(there), UNFILTERED)]
                    report.other[UNFILTERED] = Figure(measures.score(rows), len(rows), len(videos))
                continue
            expected = len(videos)
            if name == "temporal_flickering":
                report.kept = _static(there, log, progress)
                expected = len(report.kept) * measures.STATIC_VIDEOS
                rows = _of_static(there, report.kept, log, progress)
            else:
                rows = [{"video_path": str(file), **log.row(name, file)} for file in progress(list(there), name)]
            if not rows:
                report.skipped[name] = "the static filter keeps none of its videos"
                continue
            report.dimensions[name] = Figure(measures.score(rows), len(rows), expected)
            content = {name: [report.dimensions[name].score, rows]}
            write_text(task.out / f"{name}_eval_results.json", json.dumps(content, indent=4, ensure_ascii=False))
        record = json.dumps(_record(task, report), indent=2, ensure_ascii=False)
        write_text(task.out / "measured.json", record + "\n")
    return report


def _static(there: Mapping[Path, Video], log: "_Log", progress: Progress) -> dict[str, list[str]]:
    """Return prompt -> names of the first videos that are static, in the order of the official filter."""
    of_prompt: dict[str, list[Path]] = {}
    for file, video in there.items():
        of_prompt.setdefault(video.prompt, []).append(file)
    kept: dict[str, list[str]] = {}
    for prompt, files in progress(list(of_prompt.items()), STATIC):
        static = (file.name for file in sorted(files) if log.row(STATIC, file)["static"])
        kept[prompt] = list(itertools.islice(static, measures.STATIC_VIDEOS))
    return kept


def _of_static(
    there: Mapping[Path, Video], kept: Mapping[str, list[str]], log: "_Log", progress: Progress
) -> list[Row]:
    """Return the rows of temporal_flickering; each video has the name that the official filter copies it to."""
    files = {file.name: file for file in there}
    named = [(f"{prompt}-{i}.mp4", files[name]) for prompt, names in kept.items() for i, name in enumerate(names)]
    return [
        {"video_path": f"filtered_videos/{name}", **log.row("temporal_flickering", file), "source": str(file)}
        for name, file in progress(named, "temporal_flickering")
    ]


class _Log:
    """Rows that are there already, by what they are of, the bytes of the video, and the models; one more a line."""

    def __init__(self, path: Path, models: Models):
        self._path, self._models = path, models
        self._rows: dict[tuple, Row] = {}
        self._digests: dict[Path, str] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for line in lines:
            # The last one may be half a line.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                self._rows[(entry["what"], entry["video"], tuple(entry["with"]))] = entry["row"]
        if lines:
            write_text(path, "".join(f"{line}\n" for line in lines if line.endswith("}")))

    def row(self, what: str, file: Path) -> Row:
        """Return the row of a video, measured now unless it was before."""
        if file not in self._digests:
            self._digests[file] = hashlib.sha256(file.read_bytes()).hexdigest()
        used = self._models.used(what)
        key = (what, self._digests[file], tuple(used))
        if key not in self._rows:
            try:
                self._rows[key] = FUNCTIONS[what](measures.read_clip(file), self._models)
            except measures.TooSmallError as error:
                raise UserError(f"{file}: {error}") from None
            entry = {"what": what, "video": key[1], "with": used, "row": self._rows[key], "file": file.name}
            with self._path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(entry, ensure_ascii=False) + "\n")
        return self._rows[key]


def _record(task: Task, report: Report) -> dict:
    def figures(found: Mapping[str, Figure]) -> dict:
        return {name: vars(figure) for name, figure in found.items()}

    return {
        "suite": task.suite.name,
        "videos": str(task.folder),
        "list": {"digest": task.info.digest, "other_version": task.info.other_version},
        "dimensions": {
            name: figure | {"method": METHODS[name], "models": task.models.used(name)}
            for name, figure in figures(report.dimensions).items()
        },
        "not_official": figures(report.other),
        "skipped": report.skipped,
        "notes": report.notes,
        "static_filter": report.kept,
        "jax": {"version": jax.__version__, "backend": jax.default_backend()},
    }
