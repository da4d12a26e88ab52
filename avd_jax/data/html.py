"""Pieces of a report page: tables, curves, videos. One file without scripts or anything from the network.

A piece is `Html`; every other text is escaped when it enters a piece, so that a caption can hold any characters.
"""

import base64
import contextlib
import html
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from avd_jax.data.atomic import write_text
from avd_jax.data.video import frame_rate_and_size
from avd_jax.errors import UserError

MOST_EMBEDDED = 12_000_000  # bytes of video within a page, where they take a third more; beyond it they are linked
COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa8800", "#aa3377", "#3399bb", "#888888", "#bb5522")

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #667; --line: #d6d9de; --paper: #fff; --band: #f4f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --soft: #9aa0aa; --line: #3a3f47; --paper: #16181b; --band: #202327; }
}
body { margin: 2rem auto; padding: 0 1.5rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
p { max-width: 52rem; margin: .5rem 0; } .soft, figcaption { color: var(--soft); font-size: .87rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .65rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; font-size: .87rem; color: var(--soft); vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; } tbody tr:hover { background: var(--band); }
ul { padding-left: 1.2rem; max-width: 58rem; } li { margin: .45rem 0; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem 2rem; } figure { margin: 0; flex: 1 1 24rem; max-width: 34rem; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
.videos { display: grid; grid-template-columns: 13rem repeat(var(--columns), minmax(96px, var(--most))); gap: .6rem; }
.videos p { font-size: .87rem; margin: 0; overflow-wrap: anywhere; }
.videos strong { font-size: .87rem; color: var(--soft); }
.videos figure { max-width: none; } .videos figcaption { display: none; }
.videos video, .videos i { display: block; width: 100%; aspect-ratio: var(--aspect); object-fit: contain;
  border-radius: 4px; background: var(--band); }
.bars { max-width: 44rem; } .bars p { display: flex; justify-content: space-between; margin: .8rem 0 .15rem; }
.bars p span { color: var(--soft); font-size: .87rem; } .bars div div { display: flex; height: 1.7rem; overflow: hidden;
  border-radius: 4px; color: #fff; font-size: .87rem; } .bars div span { display: grid; place-items: center; }
@media (max-width: 44rem) {
  body { margin: 1rem auto; padding: 0 .9rem; } figure { flex-basis: 100%; }
  .videos { grid-template-columns: repeat(var(--phone), minmax(0, 1fr)); } .videos strong { display: none; }
  .videos p { grid-column: 1 / -1; margin-top: .8rem; } .videos p:first-child { display: none; }
  .videos figure:has(i) { display: none; } .videos figcaption { display: block; }
  td:first-child { white-space: normal; min-width: 8rem; }
}
.badge { display: inline-block; padding: 0 .5rem; border-radius: 1rem; color: #fff; font-size: .8rem; }
""".strip()


class Html(str):
    """Text that is HTML already."""


@dataclass(frozen=True)
class Curve:
    """A line of a chart: its label in the legend and its (x, y) points, in the order of x; y is finite."""

    label: str
    points: Sequence[tuple[float, float]]


def escaped(content: object) -> Html:
    """Return anything as HTML that shows it."""
    return content if isinstance(content, Html) else Html(html.escape(str(content)))


def page_of(title: str, pieces: Sequence[Html]) -> str:
    """Return a page of pieces under a heading."""
    head = f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escaped(title)}</title>\n'
    head += f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>\n{_STYLE}\n</style>\n'
    body = "\n".join((f"<h1>{escaped(title)}</h1>", *pieces))
    return f"{head}<body>\n{body}\n</body>\n</html>\n"


def write_page(path: Path, title: str, pieces: Sequence[Html]) -> None:
    """Write a page of pieces under a heading.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        write_text(path, page_of(title, pieces))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error


def heading(text: str) -> Html:
    """A heading within the page."""
    return Html(f"<h2>{escaped(text)}</h2>")


def paragraph(text: str, *, soft: bool = False) -> Html:
    """A paragraph; a soft one is small and grey."""
    return Html(f"<p{' class=soft' if soft else ''}>{escaped(text)}</p>")


def bullets(items: Sequence[str]) -> Html:
    """A list."""
    return Html(f"<ul>{''.join(f'<li>{escaped(item)}</li>' for item in items)}</ul>")


def badge(text: str, colour: str) -> Html:
    """A word on a coloured ground."""
    return Html(f'<span class="badge" style="background:{escaped(colour)}">{escaped(text)}</span>')


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Html:
    """A table; every row has a cell for each column of the header."""
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"every row needs {len(header)} cells")
    head = "".join(f"<th>{escaped(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escaped(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return Html(f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>')


def charts(figures: Sequence[Html]) -> Html:
    """Figures side by side, as many as fit."""
    return Html(f'<div class="charts">{"".join(figures)}</div>')


def line_chart(title: str, curves: Sequence[Curve], *, x_label: str = "step") -> Html:
    """Curves over a common x, as inline SVG with axes and a legend; curves without points are left out."""
    shown = [(i, curve) for i, curve in enumerate(curves) if curve.points]
    if not shown:
        raise ValueError(f"no curve of {title!r} has a point")
    xs, ys = zip(*(point for _, curve in shown for point in curve.points), strict=True)
    left, right, top, bottom = 52.0, 535.0, 24.0, 196.0
    x_axis, y_axis = _axis(min(xs), max(xs), left, right), _axis(min(ys), max(ys), bottom, top)
    rows = -(-len(shown) // 3)
    parts = [f'<svg viewBox="0 0 545 {230 + 16 * rows}" role="img" aria-label="{escaped(title)}">']
    parts.append(f'<text x="{left}" y="14" style="font-weight:600">{escaped(title)}</text>')
    for value in y_axis.ticks:
        y = y_axis.place(value)
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in x_axis.ticks:
        place = f'x="{x_axis.place(value):.1f}" y="{bottom + 15}"'
        parts.append(f'<text {place} text-anchor="middle">{value:.4g}</text>')
    parts.append(f'<text x="{right}" y="{bottom + 29}" text-anchor="end">{escaped(x_label)}</text>')
    for row, (i, curve) in enumerate(shown):
        colour = COLOURS[i % len(COLOURS)]
        points = " ".join(f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}" for x, y in curve.points)
        if len(curve.points) == 1:
            x, y = points.split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        x, y = left + 165 * (row % 3), bottom + 42 + 16 * (row // 3)
        parts.append(f'<line x1="{x}" x2="{x + 16}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 21}" y="{y}">{escaped(curve.label)}</text>')
    return Html(f"<figure>{''.join(parts)}</svg></figure>")


@dataclass(frozen=True)
class Bar:
    """A stacked bar.

    Attributes:
      labels: of its parts, in their order; they stand above it.
      shares: of the parts; they sum to 1.
      colours: of the parts.
    """

    labels: Sequence[str]
    shares: Sequence[float]
    colours: Sequence[str]


def stacked_bars(bars: Sequence[Bar]) -> Html:
    """Bars below each other, each as wide as the page, so that they are read on a phone too."""
    pieces = []
    for bar in bars:
        parts = "".join(
            f'<span style="flex:{share:.4f} 0 0;background:{escaped(colour)}">{_percent(share)}</span>'
            for share, colour in zip(bar.shares, bar.colours, strict=True)
            if share
        )
        told = ", ".join(f"{label} {share:.0%}" for label, share in zip(bar.labels, bar.shares, strict=True))
        labels = "".join(f"<span>{escaped(label)}</span>" for label in bar.labels)
        pieces.append(f'<div><p>{labels}</p><div role="img" aria-label="{escaped(told)}">{parts}</div></div>')
    return Html(f'<div class="bars">{"".join(pieces)}</div>')


def video_table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Path | None]]], *, page: Path) -> Html:
    """Videos side by side, all of one size: a row is a caption and one file a column (None leaves a gap).

    The files are put into the page if all of them together are small enough, so that it can be sent alone; else
    the page links to them, and only the whole folder shows them.
    """
    files = [file for _, row in rows for file in row if file is not None]
    embed = sum(file.stat().st_size for file in files) <= MOST_EMBEDDED
    cells = ["<p></p>", *(f"<strong>{escaped(cell)}</strong>" for cell in columns)]
    for caption, row in rows:
        cells.append(f"<p>{escaped(caption)}</p>")
        for column, file in zip(columns, row, strict=True):
            shown = "<i></i>" if file is None else _video(file, page, embed)
            cells.append(f"<figure>{shown}<figcaption>{escaped(column)}</figcaption></figure>")
    height, width = _size_of_first(files)
    most = min(max(2 * width, 176), 400)  # small ones are easier seen larger
    style = f"--columns:{len(columns)};--phone:{min(len(columns), 2)};--aspect:{width}/{height};--most:{most}px"
    body = "\n".join(cells)
    return Html(f'<div class="scroll"><div class="videos" style="{style}">{body}</div></div>')


def _size_of_first(files: Sequence[Path]) -> tuple[int, int]:
    """Return height and width of the first video that can be read; videos of another shape are shown with margins."""
    for file in files:
        with contextlib.suppress(UserError):
            return frame_rate_and_size(file)[1:]
    return 1, 1


def _video(file: Path, page: Path, embed: bool) -> str:
    if embed:
        source = "data:video/mp4;base64," + base64.b64encode(file.read_bytes()).decode()
    else:
        source = quote(Path(os.path.relpath(file, page.parent)).as_posix())
    return f'<video src="{html.escape(source)}" autoplay loop muted playsinline></video>'


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.07 else ""  # there is no room in a narrow part


@dataclass(frozen=True)
class _Axis:
    """Values from `low` to `high` along pixels from `start` to `end`, with round numbers marked."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _axis(low: float, high: float, start: float, end: float) -> _Axis:
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-3):  # a flat line stands in the middle
        low, high = low - 0.5 * max(abs(low), 1e-3), high + 0.5 * max(abs(high), 1e-3)
    magnitude = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if (high - low) / (factor * magnitude) <= 5)
    first = math.ceil(low / step - 1e-9)
    ticks = tuple(step * i for i in range(first, math.floor(high / step + 1e-9) + 1))
    return _Axis(low, high, start, end, ticks)
