"""Pages: everything is escaped, nothing comes from elsewhere, curves lie where their numbers say."""

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest

from avd_jax.data import html
from avd_jax.data.html import Curve, Html
from avd_jax.data.video import write_video
from avd_jax.errors import UserError

NASTY = "a <b>\"bold\"</b> & 'sly' </td><script>alert(1)</script>"


class Tags(HTMLParser):
    """Notes the tags, the sources and the texts of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.sources, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def video(tmp_path):
    (tmp_path / "videos").mkdir()
    file = tmp_path / "videos" / "a b.mp4"
    file.write_bytes(b"not really a film")
    return file


def test_a_caption_stays_text_wherever_it_enters(tmp_path, video):
    page = tmp_path / "page.html"
    pieces = [
        html.heading(NASTY),
        html.paragraph(NASTY),
        html.bullets([NASTY]),
        html.table([NASTY, "b"], [[NASTY, 1.5]]),
        html.video_table([NASTY], [(NASTY, [video])], page=page),
        html.line_chart(NASTY, [Curve(NASTY, [(0, 1), (1, 2)])]),
    ]
    html.write_page(page, NASTY, pieces)
    found = Tags(page.read_text())
    assert "script" not in found.tags
    assert "b" not in found.tags
    assert found.text.count(NASTY) == 12  # the title, the first heading, and ten within the pieces


def test_a_page_holds_its_videos_and_needs_nothing_else(tmp_path, video):
    page = tmp_path / "page.html"
    html.write_page(page, "page", [html.video_table(["x", "y"], [("a", [video, None])], page=page)])
    found = Tags(page.read_text())
    assert found.tags.count("video") == 1
    assert all(source.startswith("data:video/mp4;base64,") for source in found.sources)
    assert "http" not in page.read_text()
    assert "link" not in found.tags


def test_large_videos_are_linked_from_where_the_page_lies(tmp_path, video, monkeypatch):
    monkeypatch.setattr(html, "MOST_EMBEDDED", 3)
    piece = html.video_table(["x"], [("a", [video])], page=tmp_path / "page.html")
    assert Tags(piece).sources == ["videos/a%20b.mp4"]


def test_videos_are_of_one_size_in_every_column(tmp_path):
    """Whatever their columns are called and however many gaps there are: tracks and boxes do not depend on content."""
    write_video(tmp_path / "small.mp4", np.zeros((2, 32, 48, 3)), fps=8.0)
    write_video(tmp_path / "large.mp4", np.zeros((2, 64, 64, 3)), fps=8.0)
    rows = [("a", [tmp_path / "small.mp4", tmp_path / "large.mp4", None])]
    piece = html.video_table(["x", "a column with a long title", "z"], rows, page=tmp_path / "page.html")
    assert "--columns:3;--phone:2;--aspect:48/32;--most:176px" in piece
    assert "<table" not in piece, "a table gives each column the width that its words need"
    html.write_page(tmp_path / "page.html", "page", [piece])
    style = (tmp_path / "page.html").read_text()
    assert "repeat(var(--columns), minmax(96px, var(--most)))" in style
    assert "aspect-ratio: var(--aspect); object-fit: contain" in style


def test_bars_are_as_wide_as_their_shares():
    piece = html.stacked_bars([html.Bar((NASTY, "same", "b"), (0.75, 0.0, 0.25), ("red", "grey", "blue"))])
    assert re.findall(r"flex:([\d.]+) 0 0;background:(\w+)", piece) == [("0.7500", "red"), ("0.2500", "blue")]
    found = Tags(piece)
    assert "script" not in found.tags
    assert found.text.count("%") == 2


def test_tables_are_complete():
    with pytest.raises(ValueError, match="2 cells"):
        html.table(["a", "b"], [["only one"]])
    assert html.table(["a"], [[Html("<i>x</i>")]]).count("<i>x</i>") == 1


def test_a_curve_lies_where_its_numbers_say():
    chart = html.line_chart("t", [Curve("up", [(0, 0.0), (10, 1.0)]), Curve("none", []), Curve("half", [(5, 0.5)])])
    figure = ElementTree.fromstring(chart)
    lines = [line.get("points") for line in figure.iter("polyline")]
    assert len(lines) == 2
    (x0, y0), (x1, y1) = (tuple(map(float, point.split(","))) for point in lines[0].split())
    assert (x0 < x1, y0 > y1) == (True, True), "y grows upwards"
    assert tuple(map(float, lines[1].split(","))) == pytest.approx(((x0 + x1) / 2, (y0 + y1) / 2), abs=0.1)
    assert [text.text for text in figure.iter("text")][-2:] == ["up", "half"]


@pytest.mark.parametrize("value", [0.0, 0.7, -3.0, 1e-9, 1e6])
def test_flat_curves_are_drawn(value):
    chart = html.line_chart("t", [Curve("flat", [(0, value), (100, value)])])
    numbers = [float(number) for number in re.findall(r'points="([^"]+)"', chart)[0].replace(",", " ").split()]
    assert numbers[1] == numbers[3]
    assert all(0 < number < 600 for number in numbers)


def test_a_chart_without_points_is_a_mistake():
    with pytest.raises(ValueError, match="no curve"):
        html.line_chart("t", [Curve("a", [])])


def test_a_page_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        html.write_page(tmp_path / "file" / "page.html", "page", [])
