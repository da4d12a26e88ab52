"""scripts/compare.py and scripts/serve.py as a user runs them, all in one process: to start Python takes longest."""

import json
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_scripts_generate import start
from test_serving_server import ask

from avd_jax.data.video import write_video
from avd_jax.serving.votes import COMPARABLE, VoteFile

SCRIPTS = Path(__file__).parents[1] / "scripts"
# Command lines of one script and then of the other: prints what each raises, as JSON; the last one serves for ever.
DRIVER = """
import json, runpy, sys
from absl import flags
from avd_jax.errors import UserError

flags.FLAGS.set_gnu_getopt(True)

def messages(path, lines):
    script = runpy.run_path(path)
    for line in lines:
        for name in flags.FLAGS:
            flags.FLAGS[name].unparse()
        try:
            more = flags.FLAGS(["script", *line])[1:]
            script["main"](more)
            yield ""
        except UserError as error:
            yield str(error)

compare, serve = json.loads(sys.argv[2])
for script, lines in (("compare.py", compare), ("serve.py", serve)):
    for message in messages(f"{sys.argv[1]}/{script}", lines):
        print(json.dumps({"message": message}), flush=True)
    delattr(flags.FLAGS, "out")
"""


@pytest.fixture
def folders(tmp_path):
    for method in ("a", "b"):
        write_video(tmp_path / method / "a dog-0.mp4", np.zeros((2, 16, 16, 3)), fps=8.0)
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_both_scripts(folders, tmp_path):
    votes, page = tmp_path / "votes.jsonl", tmp_path / "page.html"
    one, other = (f"{name}={folder}" for name, folder in zip(("ours", "theirs"), folders, strict=True))
    (tmp_path / "foreign.jsonl").write_text('{"a": 1}\n')
    compare = {
        (folders[0], "--out", str(page), folders[1]): "",
        (*folders, "--out", str(tmp_path / "page")): "is no page",
        (folders[0], str(tmp_path / "none"), "--out", str(page)): "none: is not a folder",
    }
    serve = {
        (): "give one of --weights",
        ("stray",): "'stray' is not a flag",
        ("--compare", one, other, "--weights", "x"): "give one of --weights",
        ("--compare", one, other): "--votes is missing",
        ("--compare", one, other, "--votes", str(tmp_path / "foreign.jsonl")): "foreign.jsonl:1: does not say",
        ("--compare", one, "--votes", str(votes)): "--compare: give two methods at least",
        ("--compare", one, "c", "--votes", str(votes)): "--compare c: write NAME=FOLDER",
        ("--compare", one, other, "--votes", str(votes), "--host", "nowhere.invalid"): "--host nowhere.invalid",
        ("--report", str(tmp_path / "results.html"), "--votes", str(votes)): "",
        ("--report", str(votes), "--votes", str(votes)): "votes.jsonl: is no page; give a file such as page.html",
        ("--report", "x.html", "--votes", str(tmp_path / "none.jsonl")): "none.jsonl: holds no votes",
        ("--weights", str(tmp_path / "nowhere")): "nowhere",
    }
    last = ["--compare", one, "--port", "0", other, "--votes", str(votes)]
    server = start("-c", DRIVER, SCRIPTS, json.dumps([[*compare], [*serve, last]]))
    try:
        lines = server.lines()
        for expected in (*compare.values(), *serve.values()):
            message = json.loads(next(line for line in lines if line.startswith('{"message"')))["message"]
            assert expected in message
            assert (bool(message), "\n" in message) == (bool(expected), False), message
        assert page.read_text().count("<video") == 2
        assert "No votes yet" in (tmp_path / "results.html").read_text()
        told = next(line for line in lines if "pairs to vote on" in line)
        host, port = re.search(r"http://([\d.]+):(\d+)/", told).groups()
        here = SimpleNamespace(server_address=(host, int(port)))
        pair = json.loads(ask(here, "/next", {"annotator": "ann"})[1])
        assert pair["prompt"] == "a dog"
        vote = {"annotator": "ann", "pair": pair["pair"], "quality": "first", "agreement": COMPARABLE}
        assert json.loads(ask(here, "/vote", vote)[1]) == {"done": 1, "of": 1}
    finally:
        server.send_signal(signal.SIGKILL)
        server.communicate()
    (kept,) = VoteFile(votes).votes()
    assert (kept.annotator, kept.agreement) == ("ann", COMPARABLE), "confirmed, and so it survives the server"
