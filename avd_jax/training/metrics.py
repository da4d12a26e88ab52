"""Where the numbers of a run go: `metrics.jsonl`, TensorBoard event files, and the terminal.

One run has one log: the first host writes it. Both files agree with the checkpoint that a run resumes from: what a
killed run logged after it is removed.
"""

import contextlib
import io
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from avd_jax.data.atomic import write_text
from avd_jax.errors import UserError
from avd_jax.parallel.hosts import is_first
from avd_jax.paths import is_bucket
from avd_jax.training.ledger import Ledger, read_lines
from avd_jax.training.mirror import Mirror


class MetricsWriter:
    """Writes one JSON object a logged step, the same scalars to TensorBoard, and a progress bar or plain lines.

    For a workdir in a bucket both are written on the local disk and uploaded now and then, see `mirror.py`.
    """

    def __init__(self, workdir: Path, *, first_step: int, num_steps: int, ledger: Ledger | None = None):
        """Continue after `first_step` (0 for a new run), dropping what was logged after it, which the ledger reads."""
        from tensorboardX import SummaryWriter  # half a second, for Google's cloud; every script imports this file

        self._path = path = workdir / "metrics.jsonl"
        self._mirror = Mirror(workdir) if is_bucket(workdir) else None
        folder = self._mirror.local if self._mirror else workdir
        with self._reporting():
            if path.exists() or self._mirror:
                lines = read_lines(path)
                kept = [line for line in lines if line["step"] <= first_step]
                kept = ledger.goes_on(lines, first_step) if ledger else kept
                write_text(folder / path.name, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = (folder / path.name).open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self._num_steps = num_steps
        self._bar = tqdm(
            total=num_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log and show the metrics of one update."""
        self.record(step, metrics)
        losses = {name: value for name, value in metrics.items() if name.startswith("loss/")}
        shown = {name.removeprefix("loss/"): f"{value:.4g}" for name, value in losses.items()}
        self._bar.set_postfix(shown, refresh=False)
        if self._bar.disable:
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            seconds = metrics.get("time/step_seconds", math.nan)
            print(f"step {step}/{self._num_steps}  {text}  {seconds:.2f} s/step", flush=True)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log numbers without showing them; one that is not finite becomes null in the JSON."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with self._reporting():
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
            if self._mirror:
                self._mirror.now_and_then()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Bring to the workdir what was logged, before a checkpoint that relies on it."""
        with self._reporting():
            self._file.flush()
            if self._mirror:
                self._board.flush()
                self._mirror.upload()

    def histogram(self, step: int, name: str, counts: Sequence[int], edges: np.ndarray) -> None:
        """Log how many values fell between neighbouring `edges`."""
        with self._reporting():
            self._file.write(json.dumps({"step": step, name: list(counts)}) + "\n")
        middles = (np.asarray(edges[1:]) + edges[:-1]) / 2
        self._board.add_histogram(name, np.repeat(middles, counts), step, bins=edges)

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`."""
        self._bar.update(step - self._bar.n)

    def video(self, name: str, step: int, video: np.ndarray, fps: float) -> None:
        """Add a video [F H W 3] in [-1, 1] to TensorBoard, as an animated image."""
        from tensorboardX.proto.summary_pb2 import Summary

        pixels = np.clip((video + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)
        frames = [Image.fromarray(frame) for frame in pixels]
        encoded = io.BytesIO()
        frames[0].save(encoded, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
        height, width = pixels.shape[1:3]
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded.getvalue())
        self._board.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def message(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        if self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def close(self) -> None:
        """Flush and close everything."""
        self._bar.close()
        with self._reporting(), self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._board.close()
            if self._mirror:
                self._mirror.close()

    @contextlib.contextmanager
    def _reporting(self):
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be written ({error.strerror}); put that right and run the same command again"
            ) from error


class NoMetrics:
    """What the other hosts have in place of a `MetricsWriter`."""

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def histogram(self, step: int, name: str, counts: Sequence[int], edges: np.ndarray) -> None:
        """Do nothing."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def advance(self, step: int) -> None:
        """Do nothing."""

    def video(self, name: str, step: int, video: np.ndarray, fps: float) -> None:
        """Do nothing."""

    def message(self, text: str) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def open_metrics(
    workdir: Path, *, first_step: int, num_steps: int, ledger: Ledger | None = None
) -> MetricsWriter | NoMetrics:
    """Return this host's writer of a run that continues after `first_step`."""
    if not is_first():
        return NoMetrics()
    return MetricsWriter(workdir, first_step=first_step, num_steps=num_steps, ledger=ledger)
