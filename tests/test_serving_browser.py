"""The served pages in a real browser: videos play, people vote, nothing runs or loads that is not ours.

Skipped without playwright (`pip install playwright`) and a Chromium, which `make test` does not install.
"""

import json
import shutil
import time

import numpy as np
import pytest
import test_curation_report
from generation_cases import STUDENT, write_dit, write_weights
from test_serving_server import serving
from test_serving_studio import NASTY, StandIn

from avd_jax.data.video import write_video
from avd_jax.generation.settings import Options
from avd_jax.serving.studio import Studio, models_of
from avd_jax.serving.study import BlindStudy
from avd_jax.serving.vote_report import results

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium")

METHODS = {"red": 0, "green": 1, "blue": 2}
# The strongest channel of what each video shows: the page itself does not tell.
STRONGEST = """() => [first, second].map(video => {
  const canvas = document.createElement("canvas"), context = canvas.getContext("2d"), sums = [0, 0, 0];
  context.drawImage(video, 0, 0, canvas.width, canvas.height);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
  pixels.forEach((value, i) => { if (i % 4 < 3) sums[i % 4] += value; });
  return sums.indexOf(Math.max(...sums));
})"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def until(page, condition):
    """Wait until an expression holds; the pages' policy forbids playwright's own way."""
    end = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.02)


def opened(browser, server, wide):
    """Return a page, and a list of what it asks of others, its errors and its dialogs."""
    context = browser.new_context(viewport={"width": 1280 if wide else 390, "height": 844}, is_mobile=not wide)
    page, unwanted = context.new_page(), []
    page.on("request", lambda asked: asked.url.startswith((server.url, "data:")) or unwanted.append(asked.url))
    page.on("pageerror", lambda error: unwanted.append(str(error)))
    page.on("dialog", lambda dialog: unwanted.append(dialog.message))
    page.goto(server.url)
    return page, unwanted


def test_two_people_vote_on_three_methods(browser, tmp_path):
    for method, channel in METHODS.items():
        for seed in range(2):
            pixels = -np.ones((9, 32, 48, 3), np.float32)
            pixels[..., channel] = 1
            file = tmp_path / method / f"{seed}.mp4"
            write_video(file, pixels, fps=8.0)
            file.with_suffix(".json").write_text(json.dumps({"prompt": NASTY, "seed": seed}))
    study = BlindStudy({name: tmp_path / name for name in METHODS}, tmp_path / "votes.jsonl", seed=0, per_pair=2)
    with serving(study.app()) as server:
        for person, wide in (("Ann", True), ("Ben", False)):
            page, unwanted = opened(browser, server, wide)
            page.fill("#name", person)
            page.click("text=Begin")
            for voted in range(6):
                until(page, f"count.textContent == 'pair {voted + 1} of 6'")
                until(page, "[first, second].every(video => video.readyState >= 3 && video.currentTime > 0)")
                assert page.inner_text("#prompt") == NASTY
                seen = page.evaluate(STRONGEST)
                if not voted:  # a reload changes nothing
                    page.reload()
                    until(page, "pair && [first, second].every(video => video.readyState >= 3)")
                    assert page.evaluate(STRONGEST) == seen
                better = "comparable" if person == "Ben" and 2 in seen else ("first", "second")[seen.index(min(seen))]
                page.click(f"[data-question=quality][data-answer={better}]")
                assert page.is_disabled("#send")
                page.click("[data-question=agreement][data-answer=comparable]")
                page.click("#send")
            until(page, "!done.hidden")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert unwanted == []
        page.goto(f"{server.url}{study.report_name}")  # Ben's phone
        for table in page.locator(".scroll").all():
            assert table.evaluate("box => box.scrollWidth <= box.clientWidth")
            assert table.get_by_text("100% (", exact=False).first.is_visible()
    found = {pair: one.by_vote[1].value for pair, one in results(study.file)["quality"].items()}
    assert found == {("red", "green"): 1.0, ("red", "blue"): 0.5, ("green", "blue"): 0.5}


def test_a_prompt_becomes_a_video_that_plays(browser, tmp_path):
    write_weights(tmp_path / "wan")
    write_dit(tmp_path / "student", student=STUDENT, seed=1)
    chosen = models_of(Options(weights=str(tmp_path / "wan"), checkpoint=str(tmp_path / "student")))
    studio = Studio(*chosen, out=tmp_path / "made", models=StandIn(), command="")
    with serving(studio.app()) as server:
        page, unwanted = opened(browser, server, wide=False)
        until(page, "frames.value != ''")
        page.fill("#prompt", NASTY)
        page.select_option("#models", "student,teacher")
        page.fill("#steps", "2")
        page.click("#send")
        until(page, "[...results.querySelectorAll('video')].filter(video => video.currentTime > 0).length == 2")
        until(page, "gallery.querySelectorAll('video').length == 2")
        assert page.inner_text("#results figcaption div") == NASTY
        page.fill("#prompt", "x" * 100_000)
        page.click("#send")
        until(page, "!message.hidden")
        assert "100,000 characters" in page.inner_text("#message")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert unwanted == []


def test_the_funnel_of_a_curation_is_seen_whole_on_a_phone(browser, tmp_path):
    summary = test_curation_report.summary(aesthetics="config.features.weights is empty")
    for entry in summary["funnel"]:
        entry |= {"in": 1_234_567, "out": 1_000_000}
    test_curation_report.page(tmp_path, test_curation_report.rows(3), summary)
    page = browser.new_context(viewport={"width": 390, "height": 844}, is_mobile=True).new_page()
    page.goto((tmp_path / "report.html").as_uri())
    funnel = page.locator(".scroll")
    assert funnel.evaluate("box => box.scrollWidth <= box.clientWidth")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for text in ("temporal_consistency", "1234567", "skipped: config.features.weights is empty"):
        assert funnel.get_by_text(text).first.is_visible()
