"""Captions over HTTP, by a server of the test's own that fails on purpose."""

import base64
import contextlib
import json
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
import pytest

from avd_jax.curation.captioning import Captioner, ask_all, clip_reader
from avd_jax.curation.settings import PROMPT, default_config
from avd_jax.data.video import write_video
from avd_jax.errors import UserError

CLIP = np.linspace(-1, 1, 9 * 32 * 48 * 3, dtype=np.float32).reshape(9, 32, 48, 3)
KEY = "sk-very-secret"


def said(text="A cat sleeps.", finish="stop", **message):
    return 200, {"choices": [{"message": {"content": text, **message}, "finish_reason": finish}]}


@contextmanager
def server(*answers):
    """Serve answers in turn, the last one for ever: (status, JSON or bytes, what to wait for); yield requests."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, dict(self.headers), json.loads(body)))
            status, answer, *pause = answers[min(len(asked), len(answers)) - 1]
            if pause and isinstance(pause[0], threading.Barrier):
                pause[0].wait(10)
            elif pause:
                time.sleep(pause[0])
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            try:
                self.send_response(status)
                if status == 307:
                    self.send_header("Location", "http://127.0.0.1:9/elsewhere")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # nobody listens any more

        def log_message(self, *arguments):
            pass

    stub = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{stub.server_port}/v1", asked
    finally:
        stub.shutdown()
        stub.server_close()


def captioner(endpoint, **changed):
    settings = default_config().caption
    settings.update({"endpoint": endpoint, "model": "vlm", "wait": 0.01, "timeout": 5.0} | changed)
    return Captioner(settings)


def ask(*answers, **changed):
    with server(*answers) as (endpoint, asked):
        return captioner(endpoint, **changed).ask(lambda: (CLIP, 16.0)), asked


def test_the_papers_prompt_is_asked_with_the_clip_as_a_video(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPTION_API_KEY", KEY)
    outcome, [(path, headers, body)] = ask(said("A cat\n\nsleeps. "))
    assert (outcome.outcome, outcome.text, outcome.reason) == ("success", "A cat sleeps.", None)
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "vlm"
    video, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": PROMPT}
    assert PROMPT == (
        "Please describe the details of this video, focusing on concrete aspects such as objects, people, colors, "
        "actions, and spatial relationships. Do not include any subjective descriptions related to symbolism, "
        "implication, or emotions."
    )
    head, _, data = video["video_url"]["url"].partition(",")
    assert head == "data:video/mp4;base64"
    (tmp_path / "clip.mp4").write_bytes(base64.b64decode(data))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate, stream.width, stream.height) == (9, 16, 48, 32)


def test_servers_that_know_no_video_get_images():
    _, [(_, headers, body)] = ask(said(), send="images", images=4)
    *images, _ = body["messages"][0]["content"]
    assert [image["image_url"]["url"][:23] for image in images] == ["data:image/jpeg;base64,"] * 4
    assert len({image["image_url"]["url"] for image in images}) == 4
    assert "Authorization" not in headers


NONSENSE = "answers what is no chat completion"


@pytest.mark.parametrize(
    ("answers", "outcome", "reason", "tries"),
    [
        ([(500, {}), (503, {}), said()], "success", None, 3),
        ([(500, {"error": "out of memory"})], "error", "answers 500 Internal Server Error", 3),
        ([(400, {"error": "too long"})], "error", 'answers 400 Bad Request: {"error": "too long"}', 1),
        ([(401, {})], "error", "put a key into CAPTION_API_KEY", 1),
        ([(404, {})], "error", "is config.caption.model one of its models", 1),
        ([(307, {})], "error", "answers 307", 1),
        ([(200, b"<html>")], "error", f"{NONSENSE}: <html>", 1),
        ([(200, b"")], "error", NONSENSE, 1),
        ([(200, {"choices": []})], "error", NONSENSE, 1),
        ([(200, [1])], "error", NONSENSE, 1),
        ([said(7)], "error", NONSENSE, 1),
        ([said("\ud800")], "error", NONSENSE, 1),
        ([(200, b"[" * 100_000)], "error", NONSENSE, 1),
        ([said(None, refusal="no \ud800 way")], "blocked", "the model refuses: no \\ud800 way", 1),
        ([said(" \n")], "error", "answers with an empty caption", 1),
        ([said(None)], "error", "answers with an empty caption", 1),
        ([said(None, refusal="I cannot")], "blocked", "the model refuses: I cannot", 1),
        ([said("", "content_filter")], "blocked", "the model refuses: content_filter", 1),
        ([said("A cat sl", "length")], "truncated", "cut off at 512 tokens", 1),
        ([said([{"type": "text", "text": "A cat."}])], "success", None, 1),
    ],
)
def test_whatever_the_server_does_is_an_outcome_with_a_reason(answers, outcome, reason, tries):
    found, asked = ask(*answers)
    assert found.outcome == outcome
    assert (reason is None and found.reason is None) or reason in found.reason
    assert len(asked) == tries


def test_a_server_that_sends_its_headers_in_drops_is_waited_for_no_longer_than_the_timeout():
    stopped, listener = threading.Event(), socket.create_server(("127.0.0.1", 0))

    def drip():
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            for number in range(600):
                if stopped.wait(0.05):
                    break
                connection.sendall(f"X-{number}: a\r\n".encode())

    threading.Thread(target=drip, daemon=True).start()
    with listener:
        outcome = captioner(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", timeout=0.3, tries=1).ask(
            lambda: (CLIP, 16.0)
        )
    stopped.set()
    assert "no answer within 0.3 s (config.caption.timeout)" in outcome.reason
    assert not outcome.hopeless


def test_a_server_that_is_down_is_hopeless_and_a_slow_one_is_not():
    with server(said()) as (endpoint, _):
        pass
    down = captioner(endpoint).ask(lambda: (CLIP, 16.0))
    assert down.reason == f"{endpoint}: cannot be reached (Connection refused)"
    assert down.hopeless
    slow, asked = ask((*said(), 0.6), timeout=0.15, tries=2)
    assert "no answer within 0.15 s (config.caption.timeout)" in slow.reason
    assert not slow.hopeless
    assert len(asked) == 2


def test_the_key_is_in_no_reason(monkeypatch):
    monkeypatch.setenv("CAPTION_API_KEY", KEY)
    outcome, _ = ask((401, {"error": f"{'x' * 180} {KEY} is wrong"}))
    assert outcome.hopeless
    assert "the key in CAPTION_API_KEY is refused" in outcome.reason
    assert "sk-" not in outcome.reason
    monkeypatch.setenv("CAPTION_API_KEY", "sk\nbroken")
    with pytest.raises(UserError, match=r"^CAPTION_API_KEY: the environment variable holds no key") as error:
        captioner("http://127.0.0.1:9/v1")
    assert "broken" not in str(error.value)


def test_several_are_asked_at_once_and_after_a_hopeless_one_no_more():
    clips = [(str(i), lambda: (CLIP, 16.0)) for i in range(12)]
    with server((*said(), threading.Barrier(6))) as (endpoint, asked):  # none is answered before six have asked
        outcomes = dict(ask_all(captioner(endpoint, send="images"), clips, concurrency=6))
    assert {outcome.outcome for outcome in outcomes.values()} == {"success"}
    assert (len(outcomes), len(asked)) == (12, 12)
    with server((403, {})) as (endpoint, asked):
        outcomes = dict(ask_all(captioner(endpoint, send="images"), clips, concurrency=2))
    assert {outcome.reason for outcome in outcomes.values()} == {outcomes["0"].reason}
    assert (len(outcomes), len(asked)) == (12, 2)


def test_a_clip_is_read_with_its_own_shape_and_a_broken_one_is_a_reason(tmp_path):
    write_video(tmp_path / "a.mp4", np.zeros((30, 40, 96, 3)), fps=16.0)
    row = {"frames": 9, "fps": 8.0, "start": 0.25, "size": [96, 40]}
    video, fps = clip_reader(tmp_path / "a.mp4", row, height=20, fps=4.0)()
    assert (video.shape, fps) == ((4, 20, 48, 3), 4.0)
    video, fps = clip_reader(tmp_path / "a.mp4", row, height=480, fps=30.0)()
    assert (video.shape, fps) == ((9, 40, 96, 3), 8.0)
    outcome = captioner("http://127.0.0.1:9/v1").ask(clip_reader(tmp_path / "gone.mp4", row, height=20, fps=4.0))
    assert (outcome.outcome, outcome.hopeless) == ("error", False)
    assert "gone.mp4: cannot be read" in outcome.reason
