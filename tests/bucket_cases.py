"""What the tests of buckets share: the emulator, what programs are told of it, and its faults and counts."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

SERVER = Path(__file__).with_name("bucket_server.py")


class BucketServer:
    """A running emulator with a bucket `gs://bucket`; `environment` is what makes this process and others use it."""

    def __init__(self, folder: Path | None = None):
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER), *([str(folder)] if folder else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.url,  # gcsfs and google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "a-token",  # tensorstore's
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url,  # array_record
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "NO_GCE_CHECK": "true",
            "EPATH_USE_TF": "false",
        }

    def close(self):
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def faults(self, *faults: dict) -> None:
        """Answer with these faults from now on, each `times` times; without any all is well again."""
        self._ask("/_faults", [{"times": 1_000_000, "status": 0, **fault} for fault in faults])

    def requests(self) -> list[tuple[str, int, str]]:
        """Return (method and path, bytes sent, range asked for) of each request since the last call."""
        return [tuple(request) for request in self._ask("/_requests")]

    def _ask(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data), timeout=60) as answer:
            return json.load(answer)


def started() -> BucketServer:
    server = BucketServer()
    os.environ.update(server.environment)  # libraries read it when they first see a bucket
    return server
