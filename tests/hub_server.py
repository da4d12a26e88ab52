"""A stub of the Hugging Face Hub's protocol on 127.0.0.1: repositories in memory, requests counted, uploads kept."""

import base64
import hashlib
import http.server
import json
import threading
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories name -> file -> bytes, and what was asked for.

    Attributes:
      files: of each repository.
      gated: names of repositories that are listed, but whose files nobody may have.
      requests: (method, path) in order.
      pushed: repository -> file -> bytes, and the branch under "".
    """

    def __init__(self):
        self.files, self.gated, self.requests, self.pushed = {}, set(), [], {}

    def downloads(self):
        """Return the files that were sent."""
        return [
            path.rpartition(f"/resolve/{COMMIT}/")[2]
            for method, path in self.requests
            if method == "GET" and "/resolve/" in path
        ]

    def __enter__(self):
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._resolve()

    def do_GET(self):
        path = self._note()
        parts = path.split("/")
        if parts[1:3] != ["api", "models"]:
            return self._resolve(path)
        repo, rest = "/".join(parts[3:5]), parts[5:]
        if repo not in self.state.files:
            return self._refuse(404, "RepoNotFound")
        if rest[:1] == ["revision"] and rest[1] not in ("main", "v1", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        names = sorted(self.state.files[repo])
        if rest[:1] == ["tree"]:
            sizes = [len(self.state.files[repo][name]) for name in names]
            return self._send(
                [{"type": "file", "path": n, "size": s, "oid": "0"} for n, s in zip(names, sizes, strict=True)]
            )
        return self._send({"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]})

    def do_POST(self):
        path = self._note()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.headers.get("Authorization"):
            return self._refuse(401, "")
        if path == "/api/repos/create":
            made = json.loads(body)
            repo = "/".join(filter(None, (made.get("organization"), made["name"])))
            self.state.pushed.setdefault(repo, {})
            return self._send({"url": f"{self.state.url}/{repo}"})
        if path == "/api/validate-yaml":  # of the card
            return self._send({"errors": [], "warnings": []})
        parts = path.split("/")
        repo, what, branch = "/".join(parts[3:5]), parts[5], parts[6]
        if what == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            return self._send({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.state.pushed[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.state.pushed[repo][""] = branch
        return self._send({"commitUrl": f"{self.state.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

    def _resolve(self, path=None):
        path = path or self._note()
        repo, _, rest = path[1:].partition("/resolve/")
        name = rest.partition("/")[2]
        if repo in self.state.gated:
            return self._refuse(403, "GatedRepo")
        content = self.state.files.get(repo, {}).get(name)
        if content is None:
            return self._refuse(404, "EntryNotFound")
        return self._send(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', **{"X-Repo-Commit": COMMIT})

    def _note(self):
        path = unquote(urlparse(self.path).path)
        self.state.requests.append((self.command, path))
        return path

    def _refuse(self, status, code):
        self._send({"error": code}, status, **{"X-Error-Code": code})

    def _send(self, content, status=200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
