"""What the official tools would pass over, or trip on, in a folder of videos.

VBench takes the suffix of whichever file comes first for all of them, and a video that is missing for a warning;
VBench-2.0 stops at one. Neither looks at frames, rate or size, and the rate decides which frames are compared.
"""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from avd_jax.data.video_file import opened
from avd_jax.errors import UserError
from avd_jax.evaluation.vbench.suites import Info, Suite
from avd_jax.evaluation.vbench.videos import Video, wanted

OTHER_VERSION = "list of prompts"
MISSING = "missing"
SURPLUS = "surplus"
OTHER_FILES = "not a video"
UNREADABLE = "unreadable"
OTHER_SHAPE = "another frame rate, length or size"
REPEATED = "the same video again"


@dataclass(frozen=True)
class Finding:
    """Something that is wrong: what kind of thing, the file or folder, and what about it."""

    kind: str
    where: str
    what: str


@dataclass(frozen=True)
class Shape:
    """What all videos have in common."""

    frames: int
    height: int
    width: int
    fps: float

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.height}x{self.width} at {self.fps:g} a second"


def check(
    folder: Path,
    suite: Suite,
    info: Info,
    limits: Mapping[str, int | None],
    *,
    shape: Shape | None = None,
    on_progress: Callable[[int], object] = lambda done: None,
) -> list[Finding]:
    """Return all that is wrong with the videos in a folder, grouped by kind; every video is decoded.

    Args:
      folder: with the suite's folders in it, or all videos in one.
      suite: which one.
      info: its list of prompts.
      limits: what should be there, see `wanted`.
      shape: what the videos should be; None for what most of them are.
      on_progress: called with the number of further videos that have been looked at.

    Raises:
      UserError: the folder is none.
    """
    if not folder.is_dir():
        raise UserError(f"--videos {folder}: there is no such folder")
    findings = []
    if info.other_version:
        what = f"is not {suite.title}'s own list: {info.other_version}"
        findings.append(Finding(OTHER_VERSION, str(info.path), what))
    expected, flat = defaultdict(dict), is_flat(folder, suite)
    for video in wanted(suite, info, limits):
        expected["" if flat else video.folder].setdefault(video.name, video)
    homes = defaultdict(set)
    for video in wanted(suite, info, dict.fromkeys(suite.folders.values())):
        homes[video.name].add(video.folder)
    files = []
    for name, videos in expected.items():
        found = _listed(folder / name)
        if found is None:
            findings.append(Finding(MISSING, f"{name}/", f"the folder, with {len(videos)} videos"))
            continue
        findings += _compare(name, set(found), videos, homes, suite)
        files += [folder / name / file for file in found if file in videos]
    if not flat:
        findings += _strangers(folder, suite)
    findings += _contents(folder, files, shape, on_progress)
    order = (OTHER_VERSION, MISSING, SURPLUS, OTHER_FILES, UNREADABLE, OTHER_SHAPE, REPEATED)
    return sorted(findings, key=lambda finding: order.index(finding.kind))


def is_flat(folder: Path, suite: Suite) -> bool:
    """Return whether all videos lie in this one folder: none of the suite's folders is there."""
    return not any((folder / name).is_dir() for name in suite.folders.values()) and any(folder.glob("*.mp4"))


def report(findings: Iterable[Finding], *, most: int = 20) -> str:
    """Return the findings as text, a line each under the name of their kind; of a kind `most` at most are told."""
    kinds = defaultdict(list)
    for finding in findings:
        kinds[finding.kind].append(finding)
    lines = []
    for kind, found in kinds.items():
        lines.append(f"{kind} ({len(found)}):")
        lines += [f"  {finding.where}: {finding.what}" for finding in found[:most]]
        if len(found) > most:
            lines.append(f"  ... and {len(found) - most} more; --json FILE writes all")
    return "\n".join(lines)


def _listed(folder: Path) -> list[str] | None:
    return sorted(os.listdir(folder)) if folder.is_dir() else None


def _compare(
    folder: str, found: set[str], videos: Mapping[str, Video], homes: Mapping[str, set[str]], suite: Suite
) -> Iterable[Finding]:
    """Yield what a folder has too much and too little; prompts that are not asked for may be there, too."""
    prefix = f"{folder}/" if folder else ""
    for name in videos:
        if name not in found:
            yield Finding(MISSING, prefix + name, _why_missing(name, found))
    for name in sorted(found):
        if name in videos or (name in homes and folder in ("", *homes[name])):
            continue
        numbered = re.fullmatch(r"(.*)-(\d+)\.mp4", name, re.DOTALL)
        if Path(name).suffix != ".mp4" or name.startswith("."):
            yield Finding(OTHER_FILES, prefix + name, "only the videos may lie here; move it elsewhere")
        elif name in homes:
            yield Finding(SURPLUS, prefix + name, f"belongs into {', '.join(sorted(homes[name]))}/")
        elif numbered is None:
            yield Finding(SURPLUS, prefix + name, "is not named PROMPT-NUMBER.mp4")
        elif f"{numbered[1]}-0.mp4" in homes:
            yield Finding(SURPLUS, prefix + name, f"{suite.title} wants fewer videos of this prompt")
        else:
            yield Finding(SURPLUS, prefix + name, "has no prompt of the list; it may be of another version")


def _why_missing(name: str, found: set[str]) -> str:
    """Return what is known of a file that is not there: one with nearly its name may be."""
    plain = Path(name).stem
    alike = next((file for file in found if Path(file).stem == plain or file.casefold() == name.casefold()), None)
    return f"is not there, but {alike!r} is" if alike else "is not there"


def _strangers(folder: Path, suite: Suite) -> Iterable[Finding]:
    """Yield what lies beside the suite's folders."""
    for name in _listed(folder):
        if not (folder / name).is_dir():
            yield Finding(OTHER_FILES, name, "only the folders of the dimensions may lie here; move it elsewhere")
        elif name not in suite.folders.values():
            yield Finding(SURPLUS, f"{name}/", f"is no folder of {suite.title}")


def _contents(
    root: Path, files: list[Path], shape: Shape | None, on_progress: Callable[[int], object]
) -> Iterable[Finding]:
    """Yield what is wrong inside the files."""
    shapes, digests = {}, {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # FFmpeg decodes outside of Python's lock
        for file, (found, digest) in zip(files, pool.map(_probe, files), strict=True):
            name = str(file.relative_to(root))
            on_progress(1)
            if isinstance(found, str):
                yield Finding(UNREADABLE, name, found)
                continue
            shapes[name] = found
            # The same video may be wanted in two folders, under the same name.
            other = digests.setdefault(digest, file)
            if other.name != file.name:
                yield Finding(REPEATED, name, f"is {other.relative_to(root)} again; each needs a seed of its own")
    if not shapes:
        return
    common = shape or Counter(shapes.values()).most_common(1)[0][0]
    whose = "as it was exported" if shape else "as most are"
    for name, found in shapes.items():
        if found != common:
            yield Finding(OTHER_SHAPE, name, f"{found}, not {common}, {whose}")


def _probe(file: Path) -> tuple[Shape | str, str]:
    """Return what a video is, or why it cannot be read, and a hash of the file."""
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        with opened(file) as video:
            frames, sizes = 0, set()
            for _, frame in video.frames():
                frames += 1
                sizes.add((frame.height, frame.width))
            rate = video.rate
        if not frames or not rate:
            return "has no frames, or does not state their rate", digest
        if len(sizes) > 1:
            return "its frames change their size", digest
        return Shape(frames, *sizes.pop(), round(rate, 3)), digest
    except OSError as error:
        return f"cannot be read ({error.strerror})", ""
    except UserError as error:
        return str(error).removeprefix(f"{file}: "), ""
