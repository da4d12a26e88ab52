"""What the analysis of videos costs beside decoding them, and what it says of given files.

    python benchmarks/curation.py --videos videos/ --repeats 5
    python benchmarks/curation.py --videos videos/ --scores

The first scales the videos to 720p (H.264) unless they are of that size, then lets two processes decode them and
analyse them in turns. The second prints a line for each clip.
"""

import multiprocessing
import statistics
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
from absl import flags

from avd_jax.curation.analysis import DEFAULTS, analyse
from avd_jax.data.video import frame_rate_and_size
from avd_jax.data.video_file import opened
from avd_jax.errors import UserError

VIDEOS = flags.DEFINE_string("videos", None, "Folder of videos.", required=True)
SCORES = flags.DEFINE_bool("scores", False, "Print scores instead of measuring time.")
REPEATS = flags.DEFINE_integer("repeats", 5, "How often each is timed.", lower_bound=1)
WORKERS = flags.DEFINE_integer("workers", 2, "Processes.", lower_bound=1)
FRAMES = flags.DEFINE_integer("frames", DEFAULTS["frames"], "Frames of a clip, for --scores.", lower_bound=2)
SUFFIXES = {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi"}


def main() -> None:
    """Measure and print."""
    paths = sorted(path for path in Path(VIDEOS.value).iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(f"{VIDEOS.value}: no videos")
    if SCORES.value:
        for path in paths:
            _print_scores(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        scaled = [_scaled(path, Path(folder) / f"{number}.mp4") for number, path in enumerate(paths)]
        _measure(scaled)


def _measure(paths: list[Path]) -> None:
    # Twice each, so that the last one does not leave a process idle for long.
    work = sorted(paths, key=lambda path: -path.stat().st_size) * 2
    ways = {"decoding": _decode, "analysis": _analyse}
    walls: dict[str, list[float]] = {name: [] for name in ways}
    cpus: dict[str, list[float]] = {name: [] for name in ways}
    with multiprocessing.get_context("spawn").Pool(WORKERS.value) as pool:
        pool.map(_peak_memory, range(WORKERS.value))  # imports
        for _ in range(REPEATS.value):
            for name, way in ways.items():
                start = time.perf_counter()
                done = pool.map(way, work, chunksize=1)
                seconds = sum(seconds for seconds, _ in done)
                walls[name].append(seconds / (time.perf_counter() - start))
                cpus[name].append(seconds / sum(cpu for _, cpu in done))
        peak = max(pool.map(_peak_memory, range(8 * WORKERS.value), chunksize=1))
    for what, rates in (("a second", walls), ("a second of CPU time", cpus)):
        decoding, analysis = (statistics.median(values) for values in rates.values())
        ratio = statistics.median(a / b for a, b in zip(*rates.values(), strict=True))
        print(f"video seconds {what}: decoding {decoding:.1f}, analysis {analysis:.1f}; median of ratios {ratio:.2f}")
    print(f"peak memory of a worker: {peak:.0f} MB")


def _scaled(path: Path, target: Path) -> Path:
    """Write the video again at 720 lines, as H.264; return it if it is such a one."""
    if frame_rate_and_size(path)[1] == 720:
        return path
    with opened(path) as file, av.open(str(target), "w") as container:
        stream = None
        for number, (_, frame) in enumerate(file.frames()):
            if stream is None:
                rate = round(file.rate or 25)
                stream = container.add_stream("libx264", rate=rate, options={"crf": "20"})
                stream.width, stream.height = 2 * round(frame.width * 360 / frame.height), 720
                stream.pix_fmt = "yuv420p"
            picture = frame.reformat(width=stream.width, height=720, format="yuv420p", interpolation="LANCZOS")
            picture.pts, picture.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return target


def _decode(path: Path) -> tuple[float, float]:
    """Return how many seconds the video and the work last."""
    start = time.process_time()
    with opened(path) as file:
        for now, _ in file.frames():
            last = now
        return last + 1 / file.rate, time.process_time() - start


def _analyse(path: Path) -> tuple[float, float]:
    start = time.process_time()
    result = analyse(path, DEFAULTS)
    return result["video"]["seconds"], time.process_time() - start


def _peak_memory(_: int) -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def _print_scores(path: Path) -> None:
    result = analyse(path, {**DEFAULTS, "frames": FRAMES.value})
    print(path.name, result["error"] or "", [(cut["seconds"], cut["detector"]) for cut in result["cuts"]] or "no cuts")
    for clip in result["clips"]:
        values = {name: score["value"] for name, score in clip["scores"].items() if name != "hash"}
        text = "  ".join(f"{name} {value:.3g}" for name, value in values.items())
        print(f"  {clip['start']:9.3f} {clip['end']:9.3f}  {'too short' if clip['too_short'] else text}")


if __name__ == "__main__":
    from avd_jax import command_line  # not above: the workers import this file, and need no JAX

    command_line.run(main)
