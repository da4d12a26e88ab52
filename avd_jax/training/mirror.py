"""Files that grow, of a run whose workdir is in a bucket, where nothing can be appended to.

They are written in a folder on the local disk and uploaded whole, in the background: before each checkpoint, at the
end, and in between at most once a minute, and less often once they are so large that uploading them takes a while.
"""

import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

EVERY = 60.0  # seconds between two uploads
_BYTES_A_SECOND = 2**18  # that uploads of what has grown may take, in the mean


class Mirror:
    """A local folder, `local`, whose files are uploaded to the same places in a folder of a bucket."""

    def __init__(self, folder: Path):
        """Begin with an empty local folder; `folder` may hold other things."""
        self._folder, self._holder = folder, tempfile.TemporaryDirectory()
        self.local = Path(self._holder.name)
        self._pool, self._upload = ThreadPoolExecutor(1, "mirror"), None
        self._sizes: dict[Path, int] = {}
        self._next = time.monotonic() + EVERY

    def now_and_then(self) -> None:
        """Begin an upload if it is time for one; raises what the one before did."""
        if time.monotonic() >= self._next and (self._upload is None or self._upload.done()):
            self._wait()
            self._upload: Future | None = self._pool.submit(self._all)

    def upload(self) -> None:
        """Upload what has grown, and return once it is there."""
        self._wait()
        self._all()

    def close(self) -> None:
        """Upload what has grown, and remove the local folder."""
        try:
            self.upload()
        finally:
            self._pool.shutdown()
            self._holder.cleanup()

    def _wait(self) -> None:
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.result()

    def _all(self) -> None:
        grown = 0
        for file in sorted(path for path in self.local.rglob("*") if path.is_file()):
            size = file.stat().st_size
            if size and self._sizes.get(file) != size:
                (self._folder / file.relative_to(self.local)).upload(file)
                self._sizes[file] = size
                grown += size
        self._next = time.monotonic() + max(EVERY, grown / _BYTES_A_SECOND)
