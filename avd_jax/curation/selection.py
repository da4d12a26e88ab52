"""Which clips stay: thresholds, ranks over the whole set, duplicates. Pure functions of rows.

A row is a dict as in `clips.jsonl`: id, source, start, end, frames, fps, size, scores, rejected_by. Every decision is
by value and then by id, so that the order of the rows changes nothing.
"""

import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

STAGES = (
    *("length", "resolution", "colour", "sharpness", "motion"),
    *("temporal_consistency", "aesthetics", "duplicate", "caption"),
)
LEAST = ("colour", "sharpness", "motion")  # the value of their score must reach the threshold of the same name
BEST = ("temporal_consistency", "aesthetics")  # a share of the clips with the best values stays
HASH_BITS = 64
BLOCK = 2048  # clips; two blocks are compared at once

Row = dict


@dataclass(frozen=True)
class Verdict:
    """What a stage decides about the rows that reach it.

    Attributes:
      rejected: ids.
      threshold: as `summary.json` shows it.
      details: further entries there.
      copy_of: id of a clip that shows the same as one that stays -> id of that one.
    """

    rejected: frozenset[str]
    threshold: object = None
    details: Mapping = field(default_factory=dict)
    copy_of: Mapping[str, str] = field(default_factory=dict)


def rows_of(source: str, analysis: Mapping) -> list[Row]:
    """Return the rows of a video's clips, and of its scenes that are too short to be one.

    Args:
      source: name of the video.
      analysis: what `analysis.analyse` says of it; without an error.
    """
    size = [analysis["video"]["width"], analysis["video"]["height"]]
    rows = []
    for clip in analysis["clips"]:
        start, end = round(float(clip["start"]), 3), round(float(clip["end"]), 3)
        rows.append(
            {
                "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{source}_{start}_{end}")),
                "source": source,
                "start": start,
                "end": end,
                "frames": clip.get("frames"),
                "fps": clip.get("fps"),
                "size": size,
                "scores": dict(clip.get("scores") or {}),
                "too_short": bool(clip["too_short"]),
                "rejected_by": None,
            }
        )
    return rows


def judge(stage: str, rows: Sequence[Row], thresholds: Mapping, embeddings: Mapping | None = None) -> Verdict:
    """Return what a stage, any but `caption`, decides.

    Args:
      stage: of STAGES.
      rows: those that no earlier stage has rejected.
      thresholds: `config.select`.
      embeddings: id -> vector, for `duplicate`; clips without one are told by their hashes alone.
    """
    if stage == "length":
        return Verdict(_ids(row for row in rows if row["too_short"]))
    if stage == "resolution":
        least = (thresholds["width"], thresholds["height"])
        # Whichever way up: 720x1280 is as good as 1280x720.
        small = _ids(row for row in rows if any(a < b for a, b in zip(sorted(row["size"]), sorted(least), strict=True)))
        return Verdict(small, threshold=list(least))
    if stage in BEST:
        return _best(stage, rows, thresholds[stage])
    if stage == "duplicate":
        return _duplicates(rows, thresholds, embeddings or {})
    below = {row["id"] for row in rows if not _reaches(row, stage, thresholds[stage])}
    if stage == "motion" and thresholds["codec_motion"]:
        # Not every codec tells; clips of those that do not are judged by their optical flow alone.
        told = [row for row in rows if value(row, "codec_motion") is not None]
        below |= {row["id"] for row in told if not _reaches(row, "codec_motion", thresholds["codec_motion"])}
        return Verdict(frozenset(below), thresholds[stage], {"codec_motion": thresholds["codec_motion"]})
    return Verdict(frozenset(below), threshold=thresholds[stage])


def value(row: Row, name: str) -> float | None:
    """Return the value of a score, or None if the row has none."""
    found = row["scores"].get(name, {}).get("value")
    return found if isinstance(found, int | float) and math.isfinite(found) else None


def _reaches(row: Row, name: str, least: float) -> bool:
    found = value(row, name)
    return found is not None and found >= least


def _ids(rows: Iterable[Row]) -> frozenset[str]:
    return frozenset(row["id"] for row in rows)


def _best(stage: str, rows: Sequence[Row], share: float) -> Verdict:
    """Keep a share of the rows, rounded up; of equal ones those whose id comes first."""
    ranked = sorted((row for row in rows if value(row, stage) is not None), key=lambda r: (-value(r, stage), r["id"]))
    kept = ranked[: math.ceil(share * len(ranked) - 1e-9)]
    details = {"lowest_kept": value(kept[-1], stage)} if kept else {}
    return Verdict(_ids(rows) - _ids(kept), share, {"kept": "best share", **details})


def _duplicates(rows: Sequence[Row], thresholds: Mapping, embeddings: Mapping) -> Verdict:
    """Of clips that show the same, keep the longest, then the one of the largest picture, then the sharpest.

    A clip goes if it is like one that is kept; so a chain of clips of which each is like the next does not go as one.
    Clips of one video do not overlap, so they are not compared: in front of a camera that stands still, all look alike.
    """
    ordered = sorted(rows, key=_precedence)
    names = {name: number for number, name in enumerate(sorted({row["source"] for row in ordered}))}
    videos = np.array([names[row["source"]] for row in ordered], np.int64)
    hashes = [_signs(found["value"]) if (found := row["scores"].get("hash")) else None for row in ordered]
    # Of vectors of signs, the cosine is 1 - 2 x the share of bits that differ, but for rounding.
    looks = [(_unit_vectors(hashes), 1 - 2 * (thresholds["duplicate_bits"] + 0.01) / HASH_BITS)]
    if embeddings:
        looks.append((_unit_vectors([embeddings.get(row["id"]) for row in ordered]), thresholds["duplicate_cosine"]))
    of = {ordered[later]["id"]: ordered[earlier]["id"] for later, earlier in copies(looks, videos).items()}
    details = {"cosine": thresholds["duplicate_cosine"]} if embeddings else {}
    return Verdict(frozenset(of), thresholds["duplicate_bits"], details, of)


def _precedence(row: Row) -> tuple:
    sharpness = value(row, "sharpness")
    return (
        -(row["end"] - row["start"]),
        -row["size"][0] * row["size"][1],
        -(sharpness if sharpness is not None else 0.0),
        row["source"],
        row["start"],
    )


def _signs(digits: Sequence[str]) -> np.ndarray:
    """Return the bits of a clip's hashes, one after the other, as a vector of -1 and 1."""
    words = np.array([int(text, 16) for text in digits], ">u8")
    return np.unpackbits(words.view(np.uint8)).astype(np.float32) * 2 - 1


def _unit_vectors(vectors: Sequence[np.ndarray | Sequence[float] | None]) -> np.ndarray:
    """Return float32 [N D] of length 1; zeros, which are like nothing, where there is no vector."""
    sizes = {len(vector) for vector in vectors if vector is not None}
    if len(sizes) > 1:
        raise ValueError(f"vectors of {sorted(sizes)} numbers cannot be compared")
    nothing = np.zeros(max(sizes, default=0), np.float32)
    full = [nothing if vector is None else np.asarray(vector, np.float32) for vector in vectors]
    matrix = np.array(full, np.float32).reshape(len(full), len(nothing))
    return matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)


def copies(looks: Sequence[tuple[np.ndarray, float]], videos: np.ndarray) -> dict[int, int]:
    """Return for each clip that is like an earlier one which stays the first such: later -> earlier.

    Every clip is compared with all that stay, as products of blocks of matrices; memory is bounded, and 10,000 clips
    take a few seconds.

    Args:
      looks: (unit vectors [N D], bound above which a cosine says that two are alike); one that says so is enough.
      videos: int [N]; clips of the same are not compared.
    """

    def alike(some: np.ndarray, others: np.ndarray) -> np.ndarray:
        found = np.zeros((len(some), len(others)), bool)
        for vectors, bound in looks:
            found |= vectors[some] @ vectors[others].T > bound
        return found & (videos[some][:, None] != videos[others])

    of: dict[int, int] = {}
    kept: list[int] = []
    for begin in range(0, len(videos), BLOCK):
        block = np.arange(begin, min(begin + BLOCK, len(videos)))
        for first in range(0, len(kept), BLOCK):
            others = np.array(kept[first : first + BLOCK])
            found = alike(block, others)
            gone = found.any(1)
            of |= zip(block[gone].tolist(), others[found[gone].argmax(1)].tolist(), strict=True)
            block = block[~gone]
        found, stays = alike(block, block), np.ones(len(block), bool)
        for i, clip in enumerate(block.tolist()):
            before = found[i, :i] & stays[:i]
            if before.any():
                stays[i] = False
                of[clip] = int(block[before.argmax()])
        kept += block[stays].tolist()
    return of
