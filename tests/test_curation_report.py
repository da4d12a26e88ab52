"""The page of a curation: what it shows, that all of it is escaped, and that it is one file."""

import base64
import re
import xml.etree.ElementTree as ElementTree

import curation_stand_in
import numpy as np
import pytest
from test_data_html import NASTY, Tags

from avd_jax.curation import report
from avd_jax.curation.captioning import jpeg
from avd_jax.curation.selection import STAGES, rows_of
from avd_jax.curation.thumbnails import thumbnail
from avd_jax.data.video import write_video

PICTURE = jpeg(np.zeros((9, 16, 3)))


def rows(count, rejected_by=None, source="a.mp4", **values):
    clips = [curation_stand_in.clip(10.0 * i, **values) for i in range(count)]
    return [row | {"rejected_by": rejected_by} for row in rows_of(source, curation_stand_in.found(*clips))]


def summary(**skipped):
    funnel = [{"stage": stage, "in": 9, "out": 7, "threshold": 0.5} for stage in STAGES]
    funnel[1]["threshold"], funnel[0]["threshold"] = [1280, 720], None
    funnel[-1] |= {"outcomes": {"success": 7, "error": 2}}
    funnel = [entry | ({"skipped": skipped[entry["stage"]]} if entry["stage"] in skipped else {}) for entry in funnel]
    unreadable = [{"source": f"{NASTY}.mp4", "reason": f"has {NASTY}"}]
    return {"videos": 3, "readable": 2, "clips": 9, "selected": 7, "funnel": funnel, "unreadable": unreadable}


def page(tmp_path, clips, made_of=None, most=4):
    pictures = {row["id"]: PICTURE for some in report.shown(clips, most).values() for row in some}
    report.write_report(tmp_path / "report.html", made_of or summary(), clips, pictures, most)
    return Tags((tmp_path / "report.html").read_text())


def test_the_page_shows_what_passed_and_what_each_stage_threw_out_and_why(tmp_path):
    clips = [*rows(9), *rows(6, "colour", "b.mp4", colour=0.25), *rows(1, "duplicate", "c.mp4")]
    clips[-1]["copy_of"] = clips[1]["id"]
    found = page(tmp_path, clips, summary(aesthetics="no weights"))
    images = [source for source in found.sources if source.startswith("data:image/jpeg;base64,")]
    assert len(images) == 4 + 4 + 1
    assert base64.b64decode(images[0].partition(",")[2]) == PICTURE
    for text in (
        "What passed (9)",
        "Rejected by colour (6)",
        "colour 0.25",
        "as a.mp4 from 10.00 s",
        "at least 1280x720",
    ):
        assert text in found.text
    assert "skipped: no weights" in found.text
    assert "7 success, 2 error" in found.text
    assert "Rejected by motion" not in found.text
    assert found.tags.count("svg") == 3


def test_all_is_escaped_and_nothing_comes_from_elsewhere(tmp_path):
    clips = [*rows(2, source=f"{NASTY}.mp4"), *rows(1, "caption", f"{NASTY}2.mp4")]
    clips[0]["caption"] = clips[2]["caption"] = {"outcome": "error", "text": NASTY, "reason": NASTY, "by": "vlm"}
    found = page(tmp_path, clips, summary(motion=NASTY))
    assert not {"script", "link", "iframe"} & set(found.tags)
    assert all(source.startswith("data:") for source in found.sources)
    assert found.text.count(NASTY) >= 6


def test_the_clips_next_to_the_threshold_are_shown_first():
    clips = [row for i in range(10) for row in rows(1, "motion", f"{i}.mp4", motion=i / 100)]
    values = [row["scores"]["motion"]["value"] for row in report.shown(clips, 4)["motion"]]
    assert values == [0.09, 0.06, 0.03, 0.0]
    assert report.shown(clips, 0) == {"motion": []}


def bars(svg):
    tree = ElementTree.fromstring(re.search(r"<svg.*</svg>", svg)[0])
    shapes = [(bar.attrib, float(bar.attrib["height"])) for bar in tree.iter() if bar.tag.endswith("rect")]
    line = next(x for x in tree.iter() if x.tag.endswith("line") and x.attrib["stroke"] == "#ee6677")
    return shapes, float(line.attrib["x1"])


def test_a_histogram_counts_every_clip_and_its_threshold_lies_between():
    shapes, line = bars(report.histogram("motion", [0.5] * 3 + [0.9], [0.1, 0.1], 0.2))
    unit = (180 - 36) / 3
    assert sorted(round(height / unit) for _, height in shapes) == [1, 2, 3]
    for attributes, _ in shapes:
        goes = attributes["fill-opacity"] == "0.35"
        assert (float(attributes["x"]) < line) == goes


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [-5.0, 3e9], [1e-12, 2e-12]])
def test_a_histogram_of_any_values_can_be_drawn(values):
    shapes, _ = bars(report.histogram("x", values, [], 1.0))
    assert min(float(bar["x"]) for bar, _ in shapes) >= 10
    assert max(float(bar["x"]) for bar, _ in shapes) < 535


def test_a_thumbnail_is_the_frame_at_its_time_or_none(tmp_path):
    video = np.concatenate([np.full((16, 32, 64, 3), -1.0), np.full((16, 32, 64, 3), 1.0)])
    write_video(tmp_path / "a.mp4", video, fps=16.0)
    dark, bright = (base64.b64decode(thumbnail(str(tmp_path / "a.mp4"), t, [64, 32], 32)) for t in (0.5, 1.5))
    assert dark[:2] == bright[:2] == b"\xff\xd8"
    assert dark != bright
    assert thumbnail(str(tmp_path / "gone.mp4"), 0.5, [64, 32], 32) is None
