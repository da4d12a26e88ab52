"""From the official tools' result files to their totals, and how sure a difference of two sets of videos is.

A dimension's score is the first element of its entry, {dimension: [score, [{"video_path", "video_results"}, ...]]}.
With norm = (score - min) / (max - min) and the dimensions' weights w, a group is sum(w norm) / sum(w), and the total
the mean of the groups with their own weights: `scripts/cal_final_score.py` of both suites. The official script takes a
missing dimension as 0 before the normalisation; here there is no total then.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from avd_jax.errors import UserError
from avd_jax.evaluation.vbench.suites import SUITES, Suite

NOT_JUDGED = -1  # VBench-2.0's result of a video in which there is nothing to judge; it does not count
DRAWS = 2000
TAILS = (2.5, 97.5)  # percentiles of the interval


@dataclass(frozen=True)
class Result:
    """What the official tool says of a dimension.

    Attributes:
      score: of all videos.
      videos: file name -> result of a video, on the scale of the score; without those that could not be judged.
      count: results in the file.
      path: the file.
    """

    score: float
    videos: dict[str, float]
    count: int
    path: Path


@dataclass(frozen=True)
class Totals:
    """What follows from the scores.

    Attributes:
      normalised: dimension -> 0..1, for those that have a score.
      groups: group -> 0..1, for those whose dimensions all have a score.
      total: None if a dimension is missing.
      missing: dimensions without a score.
    """

    normalised: dict[str, float]
    groups: dict[str, float]
    total: float | None
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """One value minus that of other videos of the same prompts.

    Attributes:
      value: the difference.
      low, high: an interval of 95 %; None if there is no pair of videos.
      pairs: of videos with the same name.
    """

    value: float
    low: float | None
    high: float | None
    pairs: int


def read_results(folder: Path, suite: Suite) -> dict[str, Result]:
    """Return dimension -> its result, in the suite's order, from all official result files in a folder and below.

    Files of another kind, such as the tool's copy of its list of prompts, are passed over.

    Raises:
      UserError: there are none, one is damaged, of another suite, or of a dimension that another file scores otherwise.
    """
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.json"))
    found: dict[str, Result] = {}
    for path in files:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            raise UserError(f"{path}: cannot be read as JSON; run the official tool for it again") from None
        named = path.name.endswith("_eval_results.json")
        if not (isinstance(content, dict) and (named or (content and all(map(_is_entry, content.values()))))):
            continue
        for key, entry in content.items():
            name = key.replace(" ", "_")
            if name not in suite.prompts:
                other = next((other for other in SUITES.values() if name in other.prompts), None)
                whose = f"of {other.title}; give --suite {other.name}" if other else "of another suite or version"
                raise UserError(f"{path}: {key!r} is no dimension of {suite.title}, but {whose}")
            result = _result(path, name, entry, suite)
            before = found.setdefault(name, result)
            if before.score != result.score:
                raise UserError(
                    f"{path}: scores {name} at {result.score:g}, {before.path} at {before.score:g}; keep one"
                )
    if not found:
        raise UserError(
            f"{folder}: holds no results of {suite.title} (*_eval_results.json); run the official tool first"
        )
    return {name: found[name] for name in suite.prompts if name in found}


def totals(suite: Suite, scores: Mapping[str, float]) -> Totals:
    """Return what the official script makes of the dimensions' scores; the values may also be arrays of one shape."""
    normalised = {}
    for name in suite.prompts:
        if name in scores:
            low, high = suite.bounds.get(name, (0.0, 1.0))
            normalised[name] = (scores[name] - low) / (high - low)
    groups = {}
    for group, members in suite.groups.items():
        if all(name in normalised for name in members):
            weights = {name: suite.weights.get(name, 1.0) for name in members}
            groups[group] = sum(normalised[name] * weights[name] for name in members) / sum(weights.values())
    total = None
    if len(groups) == len(suite.groups):
        weights = suite.group_weights
        total = sum(groups[group] * weights[group] for group in groups) / sum(weights.values())
    return Totals(normalised, groups, total, tuple(name for name in suite.prompts if name not in normalised))


def differences(suite: Suite, ours: Mapping[str, Result], others: Mapping[str, Result]) -> dict[str, Difference]:
    """Return how much higher a set of videos scores than another, for dimensions (raw), groups and "Total".

    The interval of 95 % is a Bayesian bootstrap's (Rubin 1981): each video, with the other set's of the same name, gets
    a random weight, the same in all dimensions that look at it. So videos of a prompt count as independent. Where the
    score is not the mean over videos, the interval of that mean is moved onto it.
    """
    shared = {name: sorted(ours[name].videos.keys() & others[name].videos.keys()) for name in ours if name in others}
    names = sorted({video for videos in shared.values() for video in videos})
    place = {video: column for column, video in enumerate(names)}
    weights = np.random.default_rng(0).exponential(size=(DRAWS, len(names))).astype(np.float32)
    drawn: list[dict[str, np.ndarray]] = [{}, {}]
    for name, videos in shared.items():
        chosen = weights[:, [place[video] for video in videos]]
        for scores, results in zip(drawn, (ours, others), strict=True):
            result = results[name]
            values = np.array([result.videos[video] for video in videos], np.float64)
            if videos:
                scores[name] = result.score - values.mean() + chosen @ values / chosen.sum(1)
            else:
                scores[name] = np.full(DRAWS, math.nan)
    mine, theirs = (
        totals(suite, {name: result.score for name, result in results.items() if name in shared})
        for results in (ours, others)
    )
    mine_drawn, theirs_drawn = (totals(suite, scores) for scores in drawn)
    found = {
        name: _difference(ours[name].score - others[name].score, drawn[0][name] - drawn[1][name], len(videos))
        for name, videos in shared.items()
    }
    for group in mine.groups:
        pairs = len({video for name in suite.groups[group] for video in shared[name]})
        spread = mine_drawn.groups[group] - theirs_drawn.groups[group]
        found[group] = _difference(mine.groups[group] - theirs.groups[group], spread, pairs)
    if mine.total is not None:
        found["Total"] = _difference(mine.total - theirs.total, mine_drawn.total - theirs_drawn.total, len(names))
    return found


def _difference(value: float, drawn: np.ndarray, pairs: int) -> Difference:
    bounds = (None, None) if np.isnan(drawn).any() else map(float, np.percentile(drawn, TAILS))
    return Difference(float(value), *bounds, pairs)


def _is_entry(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and _is_number(entry[0]) and isinstance(entry[1], list)


def _is_number(value: object) -> bool:
    return isinstance(value, float | int)


def _result(path: Path, name: str, entry: object, suite: Suite) -> Result:
    if not _is_entry(entry) or not math.isfinite(entry[0]):
        raise UserError(f"{path}: {name} has no score with a list of videos; run the official tool for it again")
    videos = {}
    for row in entry[1]:
        value = row.get("video_results") if isinstance(row, dict) else None
        if _is_number(value) and math.isfinite(value) and value != NOT_JUDGED:
            file = str(row.get("video_path", "")).replace("\\", "/").rpartition("/")[2]
            videos[file] = float(value) / (100.0 if name in suite.percent else 1.0)
    return Result(float(entry[0]), videos, len(entry[1]), path)
