"""Captions by a vision-language model behind any OpenAI-compatible server: vLLM, Ollama, a provider's.

Whatever the server does, the answer to a clip is an `Outcome` with a reason. Only what would be the same for every clip
(nobody listens, the key is refused, there is no such model) stops the asking, since the others would wait for nothing.
"""

import base64
import contextlib
import http.client
import io
import json
import os
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from avd_jax.curation.settings import VIDEO
from avd_jax.data.records import printable
from avd_jax.data.video import read_video, write_video
from avd_jax.errors import UserError

SUCCESS, TRUNCATED, BLOCKED, ERROR = "success", "truncated", "blocked", "error"
FINAL = {400, 404, 405, 413, 415, 422}  # statuses of requests that will never be granted
REFUSED = {401, 403}  # nor will any other of this run
MOST_BYTES = 4_000_000  # of an answer
SHOWN = 200  # letters of what a server says
PREPARED = 4  # clips that are decoded at once; the others wait as the few bytes that are sent


@dataclass(frozen=True)
class Outcome:
    """What became of a clip's caption.

    Attributes:
      outcome: success, truncated, blocked or error.
      text: the caption in one line, or empty.
      reason: in words, unless it is a success.
      hopeless: whether it would be the same for every other clip.
    """

    outcome: str
    text: str = ""
    reason: str | None = None
    hopeless: bool = False


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error: following it would take the key to another server, and leave the question behind."""

    def redirect_request(self, *arguments) -> None:
        return None


class _Deadline:
    """Ends connections once a request has taken too long: a server that sends drops renews every other timeout."""

    def __init__(self, seconds: float):
        self._timer, self._sockets, self.passed = threading.Timer(seconds, self._end), [], False
        self._timer.daemon = True

    def __enter__(self) -> "_Deadline":
        self._timer.start()
        return self

    def __exit__(self, *error) -> None:
        self._timer.cancel()

    def watched(self, kind: type) -> type:
        """Return a kind of connection that ends with the request."""
        deadline = self

        class Watched(kind):
            def connect(self) -> None:
                super().connect()
                deadline._sockets.append(self.sock)

        return Watched

    def _end(self) -> None:
        self.passed = True
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


class _Http(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(request.deadline.watched(http.client.HTTPConnection), request)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        kind = request.deadline.watched(http.client.HTTPSConnection)
        return self.do_open(kind, request, context=self._context)


class Captioner:
    """Asks one server for captions; its methods may be called by several threads."""

    def __init__(self, settings: Mapping):
        """Read the key.

        Args:
          settings: `config.caption`.

        Raises:
          UserError: the key is none that can be sent.
        """
        self._settings = settings
        self._key = os.environ.get(settings["api_key_env"], "").strip() if settings["api_key_env"] else ""
        if not self._key.isascii() or not self._key.isprintable():
            raise UserError(f"{settings['api_key_env']}: the environment variable holds no key that can be sent")
        endpoint = settings["endpoint"].rstrip("/")
        self._url = f"{endpoint}/chat/completions"
        handlers = [_NoRedirects(), _Http(), _Https()]
        if urlsplit(endpoint).hostname in ("localhost", "127.0.0.1", "::1"):
            handlers.append(urllib.request.ProxyHandler({}))  # a proxy's localhost is another
        self._opener = urllib.request.build_opener(*handlers)
        self._preparing = threading.Semaphore(PREPARED)

    def made_from(self) -> dict:
        """Return the settings that decide what a caption says."""
        names = ["model", "prompt", "send", "height", "fps", "max_tokens", "temperature"]
        names += [] if self._settings["send"] == VIDEO else ["images"]
        return {name: self._settings[name] for name in names}

    def ask(self, read: Callable[[], tuple[np.ndarray, float]]) -> Outcome:
        """Return the caption of a clip.

        Args:
          read: returns float32 [F H W 3] in [-1, 1] and the frames per second.
        """
        try:
            with self._preparing:
                body = json.dumps(self._request(*read())).encode()
        except UserError as error:
            return Outcome(ERROR, reason=str(error))
        pause = self._settings["wait"]
        for left in reversed(range(self._settings["tries"])):
            outcome, again = self._once(body)
            if not again or not left:
                return outcome
            time.sleep(pause)
            pause *= 2
        raise AssertionError

    def _request(self, video: np.ndarray, fps: float) -> dict:
        parts = _video_part(video, fps) if self._settings["send"] == VIDEO else self._image_parts(video)
        content = [*parts, {"type": "text", "text": self._settings["prompt"]}]
        shared = {name: self._settings[name] for name in ("model", "max_tokens", "temperature")}
        return {**shared, "messages": [{"role": "user", "content": content}]}

    def _image_parts(self, video: np.ndarray) -> list[dict]:
        chosen = np.unique(np.rint(np.linspace(0, len(video) - 1, self._settings["images"])).astype(int))
        return [_part("image_url", "image/jpeg", jpeg(video[i])) for i in chosen]

    def _once(self, body: bytes) -> tuple[Outcome, bool]:
        """Return (outcome, whether another try may go better)."""
        with _Deadline(self._settings["timeout"]) as deadline:
            answer = self._sent(body, deadline)
        late = deadline.passed and answer[0].outcome == ERROR
        return (self._late(), True) if late else answer

    def _sent(self, body: bytes, deadline: _Deadline) -> tuple[Outcome, bool]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        seconds = self._settings["timeout"]
        until = time.monotonic() + seconds
        try:
            request = urllib.request.Request(self._url, body, headers, method="POST")
            request.deadline = deadline
            with self._opener.open(request, timeout=seconds) as response:
                return self._answer(_read(response, until)), False
        except urllib.error.HTTPError as error:
            with error:
                return self._refusal(error, until)
        except TimeoutError:
            return self._late(), True
        except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", None) or error
            if isinstance(cause, TimeoutError):
                return self._late(), True
            unreachable = not isinstance(cause, http.client.HTTPException | ConnectionResetError | BrokenPipeError)
            words = getattr(cause, "strerror", None) or cause or type(cause).__name__
            return self._failure(f"cannot be reached ({words})", hopeless=unreachable), True

    def _answer(self, text: bytes) -> Outcome:
        try:
            choice = json.loads(text)["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason")
            content, refusal = message.get("content"), message.get("refusal")
            if isinstance(content, list):
                content = "".join(part.get("text") or "" for part in content)
            caption = " ".join((content or "").split())
            caption.encode()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return self._failure(f"answers what is no chat completion: {self._shown(text)}")
        if refusal or finish == "content_filter":
            return Outcome(BLOCKED, reason=f"the model refuses: {self._shown(refusal or finish)}")
        if not caption:
            return self._failure("answers with an empty caption")
        if finish == "length":
            return Outcome(TRUNCATED, caption, f"cut off at {self._settings['max_tokens']} tokens")
        return Outcome(SUCCESS, caption)

    def _refusal(self, error: urllib.error.HTTPError, until: float) -> tuple[Outcome, bool]:
        status = error.code
        try:
            said = self._shown(_read(error.fp, until))
        except (OSError, http.client.HTTPException):
            said = ""
        reason = f"answers {status} {error.reason}{f': {said}' if said else ''}"
        if status in REFUSED:
            name = self._settings["api_key_env"] or "config.caption.api_key_env"
            reason += f"; {'the key in' if self._key else 'put a key into'} {name}{' is refused' if self._key else ''}"
        if status == 404:
            reason += "; is config.caption.model one of its models, and does the endpoint end in /v1?"
        again = status not in FINAL | REFUSED and status >= 400
        return self._failure(reason, hopeless=status in REFUSED | {404}), again

    def _late(self) -> Outcome:
        return self._failure(f"no answer within {self._settings['timeout']:g} s (config.caption.timeout)")

    def _failure(self, reason: str, *, hopeless: bool = False) -> Outcome:
        return Outcome(ERROR, reason=f"{self._settings['endpoint']}: {reason}", hopeless=hopeless)

    def _shown(self, said: bytes | str) -> str:
        """Return the beginning of what a server says in one line; it may repeat the key, which must not be shown."""
        text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
        text = printable(" ".join(text.split()))
        text = text.replace(self._key, "***") if self._key else text
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def ask_all(
    captioner: Captioner, clips: Iterable[tuple[str, Callable[[], tuple[np.ndarray, float]]]], *, concurrency: int
) -> Iterator[tuple[str, Outcome]]:
    """Ask for the captions of clips, several at once; yield (clip's id, outcome) as they come.

    After an outcome that would be the same for all, the clips that were not asked for get it, too.
    """
    waiting, hopeless, asked = iter(clips), None, {}
    pool = ThreadPoolExecutor(concurrency)
    try:
        while True:
            while hopeless is None and len(asked) < concurrency and (clip := next(waiting, None)) is not None:
                asked[pool.submit(captioner.ask, clip[1])] = clip[0]
            if not asked:
                break
            for done in wait(asked, return_when=FIRST_COMPLETED).done:
                outcome = done.result()
                hopeless = outcome if outcome.hopeless else hopeless
                yield asked.pop(done), outcome
        yield from ((name, hopeless) for name, _ in waiting)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def clip_reader(path: Path, row: Mapping, *, height: int, fps: float) -> Callable[[], tuple[np.ndarray, float]]:
    """Return a function that reads a clip with its own aspect ratio, no higher than `height`, at `fps` at most."""
    shown_width, shown_height = row["size"]
    scale = min(1.0, height / shown_height)
    size = {"height": max(2, 2 * round(shown_height * scale / 2)), "width": max(2, 2 * round(shown_width * scale / 2))}

    fps = min(fps, row["fps"])
    frames = max(1, int(row["frames"] / row["fps"] * fps + 1e-6))

    def read() -> tuple[np.ndarray, float]:
        return read_video(path, frames=frames, fps=fps, start=row["start"], **size), fps

    return read


def jpeg(picture: np.ndarray, quality: int = 85) -> bytes:
    """Return a picture [H W 3] in [-1, 1] as a JPEG file."""
    file = io.BytesIO()
    pixels = np.rint((np.clip(picture, -1, 1) + 1) * 127.5).astype(np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()


def _video_part(video: np.ndarray, fps: float) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.mp4")
        write_video(path, video, fps=fps, quality=6)
        return [_part("video_url", "video/mp4", path.read_bytes())]


def _part(kind: str, media: str, data: bytes) -> dict:
    return {"type": kind, kind: {"url": f"data:{media};base64,{base64.b64encode(data).decode()}"}}


def _read(response: http.client.HTTPResponse, until: float) -> bytes:
    """Read an answer that may come in drops, each of which would renew a timeout."""
    read = b""
    while piece := response.read1(65536):
        read += piece
        if time.monotonic() > until:
            raise TimeoutError
        if len(read) > MOST_BYTES:
            raise http.client.HTTPException(f"an answer of more than {MOST_BYTES / 1e6:.0f} MB")
    return read
