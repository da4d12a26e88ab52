"""The HTTP server: what a browser asks for, and what it must not be able to do."""

import http.client
import json
import threading
from contextlib import contextmanager

import pytest

from avd_jax.errors import UserError
from avd_jax.serving.server import MOST_BYTES, App, Reply, Server, as_json, text_field


def fail(posted):
    raise ValueError("secret")


@contextmanager
def serving(app, host="127.0.0.1"):
    server = Server(app, host=host, port=0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "a.mp4").write_bytes(bytes(range(100)))
    get = {
        "": lambda rest: None if rest else Reply(b"page", "text/html"),
        "file": lambda name: Reply(folder / name) if name in ("a.mp4", "gone.mp4") else None,
        "boom": lambda rest: 1 / 0,
    }
    post = {"echo": lambda posted: {"text": text_field(posted, "text", 2000, what="the prompt")}, "fail": fail}
    with serving(App(get, post)) as running:
        yield running


def ask(server, path, posted=None, method=None, **headers):
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
    body = json.dumps(posted).encode() if isinstance(posted, dict) else posted
    if posted is not None:
        headers = {"Content-Type": "application/json", **headers}
    connection.request(method or ("GET" if posted is None else "POST"), path, body, headers)
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply.status, content, dict(reply.getheaders())


def test_a_page_and_nothing_that_it_could_load_or_run_from_elsewhere(server):
    status, content, headers = ask(server, "/")
    assert (status, content, headers["Content-Type"]) == (200, b"page", "text/html; charset=utf-8")
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'; script-src 'self';" in policy
    assert "http" not in policy
    assert ask(server, "/", method="HEAD")[1] == b""


@pytest.mark.parametrize(
    ("asked", "status", "first", "last"),
    [
        ("", 200, 0, 99),
        ("bytes=0-", 206, 0, 99),
        ("bytes=10-19", 206, 10, 19),
        ("bytes=90-500", 206, 90, 99),
        ("bytes=-5", 206, 95, 99),
        ("bytes=0-0", 206, 0, 0),
    ],
)
def test_videos_come_in_ranges_as_phones_ask_for_them(server, asked, status, first, last):
    found, content, headers = ask(server, "/file/a.mp4", **({"Range": asked} if asked else {}))
    assert (found, content) == (status, bytes(range(first, last + 1)))
    assert headers["Content-Type"] == "video/mp4"
    assert headers.get("Content-Range") == (f"bytes {first}-{last}/100" if asked else None)


def test_ranges_and_files_that_are_not_there(server):
    assert ask(server, "/file/a.mp4", Range="bytes=100-")[0] == 416
    assert ask(server, "/file/gone.mp4")[0] == 404
    for path in (
        "/file/../server.py",
        "/file/%2e%2e%2fserver.py",
        "/file//etc/passwd",
        "/nothing",
        "/page.css",
    ):
        assert ask(server, path)[0] == 404, path


def test_errors_are_messages_and_the_server_lives_on(server, capfd):
    assert ask(server, "/echo", {"text": " <script> "})[:2] == (200, b'{"text": "<script>"}')
    for posted, message in (
        ({"text": "x" * 100_000}, "100,000 characters; write 2,000 at most"),
        ({"text": 5}, "the prompt is missing"),
        ({"text": "  "}, "the prompt is missing"),
        ({"text": "\ud800"}, "half a character"),
        (b"[]", "no JSON object"),
        (b"[" * 100_000, "no JSON object"),
        (b"\xff", "no JSON object"),
    ):
        status, content, _ = ask(server, "/echo", posted)
        assert status == 400
        assert message in json.loads(content)["error"]
    assert ask(server, "/none", {})[0] == 404
    assert ask(server, "/echo", {}, **{"Content-Length": str(MOST_BYTES + 1)})[0] == 413
    for path, posted in (("/fail", {}), ("/boom", None)):
        status, content, _ = ask(server, path, posted)
        assert status == 500
        assert b"secret" not in content
    assert "ValueError: secret" in capfd.readouterr().err
    assert ask(server, "/")[0] == 200


def test_other_sites_in_the_same_browser_can_do_nothing(server):
    assert ask(server, "/", Host="evil.example")[0] == 403
    assert ask(server, "/", Host="[::1")[0] == 403
    own = f"localhost:{server.server_address[1]}"
    assert ask(server, "/echo", {"text": "x"}, Host=own, Origin=f"http://{own}")[0] == 200
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Content-Type": "text/plain"},
        {"Host": "evil.example"},
    ):
        assert ask(server, "/echo", {"text": "x"}, **headers)[0] == 403, headers


def test_a_port_that_is_taken_and_a_host_that_is_none(server):
    port = server.server_address[1]
    with pytest.raises(UserError, match=f"--port {port}: another program listens on it"):
        Server(server.app, host="127.0.0.1", port=port)
    with pytest.raises(UserError, match="--port 70000"):
        Server(server.app, host="127.0.0.1", port=70000)
    with pytest.raises(UserError, match=r"--host nowhere\.invalid"):
        Server(server.app, host="nowhere.invalid", port=0)


def test_who_asks_for_it_is_reached_by_any_name():
    with serving(App({"": lambda rest: as_json({})}), host="0.0.0.0") as server:
        assert not server.is_local
        assert ask(server, "/", Host="my.machine:1")[0] == 200
        assert server.url.startswith("http://127.0.0.1:")
