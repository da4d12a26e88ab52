"""A small HTTP server: routes to functions, files in ranges, JSON in and out, bounds on all that a visitor can send.

What a visitor types never becomes a path: a route's argument is looked up in what the application knows. Other web
sites that a visitor has open cannot use the server: a POST is JSON, which browsers ask about first and get no answer,
and on this machine's own address only its own names are taken as Host. Pages load nothing from elsewhere and run no
script but ours (Content-Security-Policy), so that a text which slips through stays a text.
"""

import contextlib
import errno
import ipaddress
import json
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from avd_jax.errors import UserError

MOST_BYTES = 1_000_000  # of what is posted
MOST_CONNECTIONS = 128
SECONDS_IDLE = 30.0
_STATIC = Path(__file__).parent / "static"
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".json": "application/json"}
_TYPES |= {".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/mp4", ".webm": "video/webm"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; media-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True)
class Reply:
    """What is sent: a body, or a file, which is streamed and may be asked for in ranges."""

    content: bytes | Path
    kind: str = ""

    @property
    def type(self) -> str:
        """The content type; that of a file follows from its suffix, whatever its name is."""
        suffix = self.content.suffix.lower() if isinstance(self.content, Path) else ""
        kind = self.kind or _TYPES.get(suffix, "application/octet-stream")
        return f"{kind}; charset=utf-8" if kind.startswith(("text/", "application/json")) else kind


@dataclass(frozen=True)
class App:
    """What a server answers.

    Attributes:
      get: first segment of a path -> function of the rest; None means that there is no such thing. `""` is the page.
      post: path without its slash -> function of the posted object; a UserError is a message on the page.
    """

    get: Mapping[str, Callable[[str], Reply | None]]
    post: Mapping[str, Callable[[dict], dict]] = field(default_factory=dict)


def static(name: str) -> Callable[[str], Reply | None]:
    """Return a route to one of our own files."""
    return lambda rest: None if rest else Reply(_STATIC / name)


def as_json(content: object) -> Reply:
    """Return a reply of JSON."""
    return Reply(json.dumps(content, ensure_ascii=False).encode("utf-8", "replace"), "application/json")


def text_field(posted: Mapping, name: str, most: int, *, what: str) -> str:
    """Return a text that was posted, stripped (UserError if it is none, is empty, has half a character, or is longer).

    Args:
      posted: the object.
      name: of its field.
      most: characters.
      what: the text is called on the page.
    """
    text = posted.get(name)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{what} is missing")
    text = text.strip()
    if len(text) > most:
        raise UserError(f"{what} has {len(text):,} characters; write {most:,} at most")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} has half a character in it; write it anew") from None
    return text


class Server(ThreadingHTTPServer):
    """Serves an application; `serve_forever` and `shutdown` are those of the standard library."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, app: App, *, host: str, port: int):
        """Listen.

        Args:
          app: what to serve.
          host: name or address of this machine to listen on; 127.0.0.1 is reached from it alone.
          port: 0 for any that is free.

        Raises:
          UserError: the port is taken or not allowed, or the host is none of this machine.
        """
        self.app = app
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        if not 0 <= port <= 65535:
            raise UserError(f"--port {port}: give one from 1 to 65535")
        try:
            (self.address_family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            super().__init__(address[:2], _Handler)
        except socket.gaierror:
            raise UserError(f"--host {host}: is no name or address of this machine; give 127.0.0.1") from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(f"--port {port}: another program listens on it; give another one") from None
            if error.errno == errno.EACCES:
                raise UserError(f"--port {port}: is not allowed to you; give one above 1023") from None
            raise UserError(f"--host {host}: cannot listen there ({error.strerror}); give 127.0.0.1") from None
        self.is_local = ipaddress.ip_address(self.server_address[0]).is_loopback

    @property
    def url(self) -> str:
        """Where to look, for a browser on this machine."""
        host, port = self.server_address[:2]
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/"

    def serve(self) -> None:
        """Answer until Ctrl-C."""
        with contextlib.suppress(KeyboardInterrupt), self:
            self.serve_forever()

    def process_request(self, request, client_address):
        """Answer in a thread of its own, if there are not too many."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address):
        """Answer, and let the next one in."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request, client_address):
        """Pass over visitors that went away."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "avd_jax", ""
    timeout = SECONDS_IDLE
    server: Server

    def do_GET(self) -> None:
        if not self._is_ours():
            return self._error(HTTPStatus.FORBIDDEN, "open this page by the address that its server printed")
        first, _, rest = unquote(urlsplit(self.path).path.lstrip("/")).partition("/")
        route = self.server.app.get.get(first)
        try:
            reply = route(rest) if route else None
        except UserError as error:
            return self._error(HTTPStatus.BAD_REQUEST, str(error))
        except Exception:
            return self._failed()
        if reply is None:
            return self._error(HTTPStatus.NOT_FOUND, "there is nothing here")
        return self._send_file(reply) if isinstance(reply.content, Path) else self._send(HTTPStatus.OK, reply)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            self.close_connection = True  # what was sent is not read
            return self._error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"that is too long; {MOST_BYTES:,} bytes at most")
        body = self.rfile.read(int(length))
        origin = self.headers.get("Origin")
        foreign = origin is not None and urlsplit(origin).netloc != self.headers.get("Host")
        if foreign or not self._is_ours() or self.headers.get_content_type() != "application/json":
            return self._error(HTTPStatus.FORBIDDEN, "only this server's own page may do that")
        action = self.server.app.post.get(urlsplit(self.path).path.lstrip("/"))
        if action is None:
            return self._error(HTTPStatus.NOT_FOUND, "there is nothing here")
        try:
            posted = json.loads(body)
        except (ValueError, RecursionError):
            posted = None
        if not isinstance(posted, dict):
            return self._error(HTTPStatus.BAD_REQUEST, "that is no JSON object")
        try:
            return self._send(HTTPStatus.OK, as_json(action(posted)))
        except UserError as error:
            return self._error(HTTPStatus.BAD_REQUEST, str(error))
        except Exception:
            return self._failed()

    def log_message(self, *args) -> None:
        """Print nothing for each request."""

    def _is_ours(self) -> bool:
        """Whether a local server is called by a local name: another site's name may have been made to lead here."""
        try:
            name = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        except ValueError:
            return False
        return not self.server.is_local or name in ("localhost", self.server.server_address[0])

    def _failed(self) -> None:
        traceback.print_exc()
        self._error(HTTPStatus.INTERNAL_SERVER_ERROR, "something went wrong; the terminal of the server says what")

    def _error(self, status: HTTPStatus, message: str) -> None:
        self._send(status, as_json({"error": message}))

    def _send(self, status: HTTPStatus, reply: Reply) -> None:
        self._head(status, reply.type, len(reply.content))
        if self.command != "HEAD":
            self.wfile.write(reply.content)

    def _send_file(self, reply: Reply) -> None:
        try:
            file = reply.content.open("rb")
        except OSError:
            return self._error(HTTPStatus.NOT_FOUND, "this file is gone")
        with file:
            size = file.seek(0, 2)
            start, end = 0, size - 1
            asked = _RANGE.fullmatch(self.headers.get("Range", ""))
            if asked and any(asked.groups()):
                first, last = asked.groups()
                start = int(first) if first else max(0, size - int(last))
                end = min(size - 1, int(last)) if first and last else size - 1
                if start > end:
                    return self._head(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, reply.type, 0, f"*/{size}")
            status = HTTPStatus.PARTIAL_CONTENT if asked else HTTPStatus.OK
            self._head(status, reply.type, end - start + 1, f"{start}-{end}/{size}" if asked else "")
            if self.command == "HEAD":
                return None
            file.seek(start)
            left = end - start + 1
            while left and (piece := file.read(min(left, 1 << 16))):
                self.wfile.write(piece)
                left -= len(piece)
            self.close_connection |= bool(left)  # the file has become shorter
        return None

    def _head(self, status: HTTPStatus, kind: str, length: int, content_range: str = "") -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": length, "Accept-Ranges": "bytes", **_HEADERS}
        if content_range:
            headers["Content-Range"] = f"bytes {content_range}"
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
