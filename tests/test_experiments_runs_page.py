"""A page on several runs and folders: what stands beside what, and what bad folders say."""

import json

import numpy as np
import pytest

from avd_jax.data.prompts import file_stem
from avd_jax.data.video import write_video
from avd_jax.errors import UserError
from avd_jax.experiments.runs_page import read_source, write_comparison

PIXELS = np.zeros((2, 16, 16, 3))


def video(file, **record):
    write_video(file, PIXELS, fps=8.0)
    if record:
        file.with_suffix(".json").write_text(json.dumps(record))


def captions_of(page):
    """The rows of the page's videos: caption -> how many columns have one."""
    grid = page[page.index('<div class="videos"') :]
    rows = grid.split("<p>")[2:]
    return {row[: row.index("</p>")]: row.count("<video") for row in rows}


def test_the_same_prompts_of_two_folders(tmp_path):
    for name, seeds in (("a", (0, 1)), ("b", (1, 2))):
        for seed in seeds:
            video(tmp_path / name / f"{file_stem('a <dog>', seed)}-{name}.mp4", prompt="a <dog>", seed=seed)
    write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    captions = captions_of(page)
    assert list(captions.items()) == [
        ("a &lt;dog&gt; (seed 1)", 2),
        ("a &lt;dog&gt; (seed 0)", 1),
        ("a &lt;dog&gt; (seed 2)", 1),
    ]
    assert "1 of 3 prompts and seeds are in every column" in page
    assert "No metrics: scripts/evaluate.py" in page
    assert "<title>a and b</title>" in page


def test_runs_show_metrics_and_curves_before_and_behind_the_videos_of_their_last_samples(tmp_path):
    for name, last in (("a", 0.5), ("b", 0.75)):
        run = tmp_path / name
        for step in (5, 10):
            video(run / "samples" / f"step_{step:06d}" / f"0_{file_stem('a red square')}.mp4")
        lines = [{"step": 5, "samples/alignment": 0.25}, {"step": 10, "samples/alignment": last}]
        half = '{"step": 15, "samples/ali'  # the training goes on
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + half)
    write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert captions_of(page) == {"a red square": 2}
    assert "a: samples of step 000010" in page
    assert "<td>0.5 (10)</td><td>0.75 (10)</td>" in page
    places = [page.index(text) for text in ("<h2>Last logged", "<h2>Videos", "<h2>Training", "<svg")]
    assert places == sorted(places)


def test_what_evaluate_measured(tmp_path):
    for name in ("a", "b"):
        folder, sets = tmp_path / name, {}
        for part, value in (("real", 1.0), ("student", 0.5)):
            video(folder / "videos" / f"{part}.mp4", **({"prompt": "a dog", "seed": 0} if part == "student" else {}))
            rows = [{"file": f"videos/{part}.mp4", "caption": "a dog"}, {"file": "gone.mp4", "caption": "a cat"}]
            sets[part] = {"videos": 2, "metrics": {"alignment": value, "flicker": None}, "rows": rows}
        (folder / "evaluation").mkdir()
        place = folder / "metrics.json" if name == "a" else folder / "evaluation" / "metrics.json"
        if name == "b":
            for part in sets.values():
                part["rows"][0]["file"] = str(folder / part["rows"][0]["file"])  # as evaluate --videos writes it
        place.write_text(json.dumps(sets))
    write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert captions_of(page) == {"a dog (seed 0)": 3}
    assert "<th>real</th><th>a: student</th><th>b: student</th>" in page
    assert "<td>1.000</td><td>0.500</td><td>0.500</td>" in page


def test_bad_folders_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, content in (("list", "[]"), ("other", '{"a": 3}'), ("rows", '{"a": {"metrics": {}, "rows": [{}]}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(content)
    video(tmp_path / "a" / "x" / "v.mp4")
    video(tmp_path / "b" / "x" / "v.mp4")
    for name, message in (
        ("nowhere", "nowhere: is not a folder"),
        ("empty", "empty: holds no videos, no metrics.json"),
        ("list", "holds a JSON list"),
        ("other", "'a' is no set that scripts/evaluate.py measured"),
        ("rows", "a row of 'a' has no file or caption"),
    ):
        with pytest.raises(UserError, match=message) as error:
            read_source(tmp_path / name)
        assert "\n" not in str(error.value)
    page = tmp_path / "page.html"
    with pytest.raises(UserError, match="two folders at least"):
        write_comparison([tmp_path / "a"], page)
    with pytest.raises(UserError, match="a: is given twice"):
        write_comparison([tmp_path / "a", tmp_path / "b" / ".." / "a"], page)
    write_comparison([tmp_path / "a" / "x", tmp_path / "b" / "x"], page)
    assert "<strong>a/x</strong><strong>b/x</strong>" in page.read_text().replace("\n", "")
