"""A bucket on this machine: gcp-storage-emulator, counting requests, with faults on demand and conditional writes.

`python bucket_server.py` prints its port and serves until its standard input ends. `POST /_faults` takes a list of
`{"match": regular expression of "METHOD /path?query", "status": 503, "message": text, "times": n, "delay": seconds}`,
which replaces the one before; a status of 0 only delays. `GET /_requests` tells and forgets what was asked for.
"""

import functools
import json
import re
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage


class Handler(RequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # 40 ms a request otherwise, with connections that are kept
    wbufsize = 2**16
    faults: list = []  # noqa: RUF012
    requests: list = []  # noqa: RUF012
    lock = threading.Lock()

    def _serve(self, method):
        if self.path.startswith("/_"):
            return self._control(method)
        asked = f"{method} {unquote(self.path)}"
        with self.lock:
            self.requests.append([asked, int(self.headers.get("Content-Length") or 0), self.headers.get("Range") or ""])
            fault = next((fault for fault in self.faults if fault["times"] and re.search(fault["match"], asked)), None)
            if fault:
                fault["times"] -= 1
        if fault:
            time.sleep(fault.get("delay", 0))
            if fault["status"]:
                return self._answer(fault["status"], {"code": fault["status"], "message": fault.get("message", "")})
        with self.lock:
            about = self._object()
            if self._condition_fails(about):
                return self._answer(412, {"code": 412, "message": "conditionNotMet"})
            getattr(super(), f"do_{method}")()

    def do_GET(self):
        self._serve("GET")

    def do_POST(self):
        self._serve("POST")

    def do_DELETE(self):
        self._serve("DELETE")

    def do_PUT(self):
        self._serve("PUT")

    def do_PATCH(self):
        self._serve("PATCH")

    def _control(self, method):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.lock:
            if method == "POST":
                type(self).faults = json.loads(body)
            told = list(self.requests)
            self.requests.clear()
        self._answer(200, told)

    def end_headers(self):
        if generation := getattr(self, "generation", None):
            self.send_header("x-goog-generation", generation)  # by which tensorstore knows what it has read
        super().end_headers()

    def _object(self):
        """Return what is known of the object that a request is about; its generation is 0 if it does not exist."""
        bucket, key = (re.search(rf"/{part}/([^?/]+)", self.path) for part in "bo")
        name = unquote(key[1]) if key else parse_qs(urlparse(self.path).query).get("name", [""])[0]
        try:
            return self.storage.get_file_obj(unquote(bucket[1]), name) if bucket and name else {}
        except NotFound:
            return {"generation": "0"}

    def _condition_fails(self, about):
        query = parse_qs(urlparse(self.path).query)
        self.generation = about.get("generation") if self.command == "GET" and query.get("alt") == ["media"] else None
        wanted = query.get("ifGenerationMatch")
        return bool(wanted) and about.get("generation") != wanted[0]

    def _answer(self, status, content):
        if self.command != "GET" and not self.path.startswith("/_"):  # what is left unread would be the next request
            self.close_connection = True
        body = json.dumps({"error": content} if status >= 400 else content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


def read_data(handler, query, read=emulator._read_data):
    """The emulator takes an object without bytes for no upload at all."""
    data = read(handler, query)
    return b"" if data is None and query.get("uploadType") == ["media"] else data


def main():
    emulator._read_data = read_data
    folder = sys.argv[1] if len(sys.argv) > 1 else None
    storage = Storage(use_memory_fs=folder is None, data_dir=folder)
    buckets.create_bucket("bucket", storage)
    ThreadingHTTPServer.daemon_threads = True
    ThreadingHTTPServer.request_queue_size = 128
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, storage))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
