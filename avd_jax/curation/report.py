"""The page on which a person sees in a minute whether the thresholds are right: one file, nothing from the network."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from avd_jax.curation.selection import BEST, LEAST, STAGES, Row, value
from avd_jax.data.html import Html, bullets, charts, escaped, heading, paragraph, table, write_page

BINS = 40
MOST_REASONS = 100  # unreadable videos that are listed
PASSED = "passed"
_STYLE = (
    "<style>.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(9rem,1fr));gap:.6rem;margin:.6rem 0}"
    ".pictures figure{min-width:0;max-width:none} .pictures img,.pictures .none{display:block;width:100%;"
    "aspect-ratio:16/9;object-fit:contain;background:var(--band);border-radius:4px} figcaption{overflow-wrap:anywhere}"
    "figcaption b{color:var(--ink)} li{overflow-wrap:anywhere}"
    # On a phone a stage takes two lines: its numbers, and below them its threshold; there is no room for the bar.
    "@media (max-width:44rem){.funnel :is(table,thead,tbody){display:block}"
    ".funnel tr{display:grid;grid-template-columns:minmax(0,1fr) repeat(3,minmax(4rem,auto));"
    "border-bottom:1px solid var(--line)} .funnel :is(th,td){min-width:0;padding:.3rem .15rem;border:0;"
    "overflow-wrap:anywhere} .funnel :is(th,td):nth-child(5),.funnel th:nth-child(6){display:none}"
    ".funnel th{font-size:.8rem;overflow-wrap:normal}"
    ".funnel td:nth-child(6){grid-column:1/-1;padding-top:0;color:var(--soft)}}</style>"
)
_ABOUT = {
    "length": "Scenes between two cuts that have no room for a clip.",
    "resolution": "Pictures that are too small.",
    "colour": "Entropy of the hues: low is monochrome.",
    "sharpness": "Variance of the Laplacian: low is blurred.",
    "motion": "Mean optical flow: low is still.",
    "codec_motion": "Mean of the codec's motion vectors: low is still.",
    "temporal_consistency": "Likeness of each frame to the one before and to the first: low is jumpy.",
    "aesthetics": "Beauty of 8 frames, as a predictor has learnt it from people.",
    "duplicate": "Clips of another video that show the same as one that stays.",
    "caption": "Clips that nobody described.",
}


def shown(rows: Sequence[Row], most: int) -> dict[str, list[Row]]:
    """Return the clips that the page shows: those that passed, and those of each stage that rejects some.

    Of a stage with scores they are evenly spread over these, beginning with the one next to the threshold.
    """
    kinds = {stage: [row for row in rows if row["rejected_by"] == stage] for stage in STAGES}
    kinds = {PASSED: [row for row in rows if row["rejected_by"] is None]} | kinds
    return {kind: _spread(some, kind, most) for kind, some in kinds.items() if some}


def write_report(path: Path, summary: Mapping, rows: Sequence[Row], pictures: Mapping[str, bytes], most: int) -> None:
    """Write the page.

    Args:
      path: the file to write.
      summary: as in `summary.json`.
      rows: as in `clips.jsonl`.
      pictures: id -> a small JPEG, of the clips that are `shown`.
      most: clips of a kind that are shown.

    Raises:
      UserError: it cannot be written.
    """
    funnel = {entry["stage"]: entry for entry in summary["funnel"]}
    passed, by_id = [row for row in rows if row["rejected_by"] is None], {row["id"]: row for row in rows}
    hours = sum(row["end"] - row["start"] for row in passed) / 3600
    pieces = [
        Html(_STYLE),
        paragraph(
            f"{summary['readable']} of {summary['videos']} videos could be read. They give {summary['clips']} clips, "
            f"of which {len(passed)} passed ({hours:.2f} hours)."
        ),
        heading("What each stage lets through"),
        _funnel(summary["funnel"]),
    ]
    figures = [chart for name in (*LEAST, "codec_motion", *BEST) if (chart := _scores(name, rows, funnel))]
    if figures:
        pieces += [
            heading("Scores and thresholds"),
            paragraph(
                "Clips that reach a stage, by their score: dark ones stay, light ones go; the line is the threshold. "
                "The last bar on either side holds all that lies beyond.",
                soft=True,
            ),
            charts(figures),
        ]
    for kind, some in shown(rows, most).items():
        if kind == PASSED:
            pieces.append(heading(f"What passed ({len(passed)})"))
        else:
            count = sum(row["rejected_by"] == kind for row in rows)
            pieces += [heading(f"Rejected by {kind} ({count})"), paragraph(_ABOUT[kind], soft=True)]
        pieces.append(_pictures(some, kind, pictures, by_id))
    if unreadable := summary["unreadable"]:
        pieces.append(heading(f"Videos that cannot be used ({len(unreadable)})"))
        pieces.append(bullets([f"{entry['source']}: {entry['reason']}" for entry in unreadable[:MOST_REASONS]]))
        if len(unreadable) > MOST_REASONS:
            pieces.append(paragraph(f"{len(unreadable) - MOST_REASONS} more are in summary.json.", soft=True))
    write_page(path, "Curation", pieces)


def _funnel(funnel: Sequence[Mapping]) -> Html:
    most = max((entry["in"] for entry in funnel), default=0) or 1
    lines = []
    for entry in funnel:
        bar = '<div style="background:var(--line);width:7rem"><div style="background:#4477aa;height:.8rem;width:'
        bar += f'{100 * entry["out"] / most:.1f}%"></div></div>'
        note = f"skipped: {entry['skipped']}" if "skipped" in entry else _threshold(entry)
        gone = "" if "skipped" in entry else entry["in"] - entry["out"]
        note = Html(f'<div style="white-space:normal;text-align:left;min-width:12rem">{escaped(note)}</div>')
        lines.append((entry["stage"], entry["in"], gone, entry["out"], Html(bar), note))
    head = Html('<div style="text-align:left">threshold</div>')
    return Html(f'<div class="funnel">{table(("stage", "in", "rejected", "out", "", head), lines)}</div>')


def _threshold(entry: Mapping) -> str:
    stage, threshold = entry["stage"], entry["threshold"]
    if stage == "resolution":
        return f"at least {threshold[0]}x{threshold[1]}, either way up"
    if stage in BEST:
        reached = f", {entry['lowest_kept']:.4g} or more" if "lowest_kept" in entry else ""
        return f"the best {100 * threshold:g} %{reached}"
    if stage == "duplicate":
        cosine = f", or a cosine above {entry['cosine']:g}" if "cosine" in entry else ""
        return f"at most {threshold:g} of 64 bits differ{cosine}"
    if stage == "caption":
        return ", ".join(f"{count} {outcome}" for outcome, count in entry["outcomes"].items() if count)
    if threshold is None:
        return ""
    codec = f", codec's vectors at least {entry['codec_motion']:g}" if "codec_motion" in entry else ""
    return f"at least {threshold:g}{codec}"


def _scores(name: str, rows: Sequence[Row], funnel: Mapping[str, Mapping]) -> Html | None:
    """Return the histogram of a score over the clips that reached its stage."""
    stage = "motion" if name == "codec_motion" else name
    entry = funnel[stage]
    at = STAGES.index(stage)
    reached = [row for row in rows if row["rejected_by"] is None or STAGES.index(row["rejected_by"]) >= at]
    values = {True: [], False: []}
    for row in reached:
        if (found := value(row, name)) is not None:
            values[row["rejected_by"] != stage].append(found)
    if not values[True] and not values[False]:
        return None
    line = entry.get("lowest_kept") if stage in BEST else entry.get(name if name == "codec_motion" else "threshold")
    return histogram(name, values[True], values[False], line, _ABOUT[name])


def histogram(title: str, stay: Sequence[float], go: Sequence[float], line: float | None, about: str = "") -> Html:
    """Return bars of how many clips have which value, those that stay below those that go, as inline SVG.

    The range is that of all but the outermost hundredth of the values on either side, and holds the line.
    """
    every = np.sort(np.asarray([*stay, *go], np.float64))
    shown = [*np.quantile(every, [0.01, 0.99]), *([] if line is None else [line])]
    low, high = float(min(shown)), float(max(shown))
    room = (high - low) or max(abs(high), 1.0) * 0.1
    low, high = max(low - 0.04 * room, min(0.0, float(every[0]))), high + 0.04 * room
    edges = np.linspace(low, high, BINS + 1)
    counts = [np.histogram(np.clip(values, low, high), edges)[0] for values in (stay, go)]
    most = max(1, int((counts[0] + counts[1]).max()))
    left, right, top, bottom = 10.0, 535.0, 36.0, 180.0
    parts = [f'<svg viewBox="0 0 545 222" role="img" aria-label="{escaped(title)}">']
    parts.append(f'<text x="{left}" y="14" style="font-weight:600">{escaped(title)}</text>')
    parts.append(f'<text x="{left}" y="29">{escaped(about)}</text>')
    width = (right - left) / BINS
    for i in range(BINS):
        base = bottom
        for number, opacity in ((counts[0][i], 1.0), (counts[1][i], 0.35)):
            height = (bottom - top) * number / most
            if number:
                parts.append(
                    f'<rect x="{left + i * width + 0.5:.1f}" y="{base - height:.1f}" width="{width - 1:.1f}" '
                    f'height="{height:.1f}" fill="#4477aa" fill-opacity="{opacity}"/>'
                )
            base -= height
    parts.append(f'<line x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="var(--soft)"/>')
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        anchor = {0.0: "start", 1.0: "end"}.get(share, "middle")
        x, number = left + share * (right - left), low + share * (high - low)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="{anchor}">{number:.3g}</text>')
    if line is not None:
        x = left + (right - left) * (line - low) / (high - low)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4}" y2="{bottom}" stroke="#ee6677" stroke-width="2"/>'
        )
        anchor = "end" if x > (left + right) / 2 else "start"
        parts.append(
            f'<text x="{x + (-5 if anchor == "end" else 5):.1f}" y="{top + 6}" text-anchor="{anchor}" '
            f'style="fill:#ee6677;font-weight:600">{line:.4g}</text>'
        )
    parts.append(f'<text x="{left}" y="{bottom + 32}">{len(stay)} stay, {len(go)} go; the highest bar is {most}</text>')
    return Html(f"<figure>{''.join(parts)}</svg></figure>")


def _spread(rows: Sequence[Row], stage: str, most: int) -> list[Row]:
    scored = stage in (*LEAST, *BEST)
    ranked = sorted(rows, key=lambda row: (-(value(row, stage) or 0.0) if scored else 0.0, row["id"]))
    if len(ranked) <= most:
        return ranked
    return [ranked[i] for i in np.unique(np.linspace(0, len(ranked) - 1, most).astype(int))] if most else []


def _pictures(rows: Sequence[Row], stage: str, pictures: Mapping[str, bytes], by_id: Mapping[str, Row]) -> Html:
    figures = []
    for row in rows:
        data = pictures.get(row["id"])
        image = '<div class="none"></div>'
        if data:
            image = f'<img alt="" loading="lazy" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'
        lines = f"<b>{escaped(_why(row, stage, by_id))}</b><br>{escaped(row['source'])}<br>"
        lines += f"{row['start']:.2f} to {row['end']:.2f} s"
        figures.append(f"<figure>{image}<figcaption>{lines}</figcaption></figure>")
    return Html(f'<div class="pictures">{"".join(figures)}</div>')


def _why(row: Row, stage: str, by_id: Mapping[str, Row]) -> str:
    """Return what decided about a clip."""
    if stage == PASSED:
        text = (row.get("caption") or {}).get("text", "")
        return f"{text[:120]}..." if len(text) > 120 else text
    if stage == "length":
        return f"{row['end'] - row['start']:.2f} s"
    if stage == "resolution":
        return "x".join(map(str, row["size"]))
    if stage == "duplicate":
        first = by_id[row["copy_of"]]
        return f"as {first['source']} from {first['start']:.2f} s"
    if stage == "caption":
        return row["caption"]["reason"] or row["caption"]["outcome"]
    found = value(row, stage)
    return f"{stage} {'unknown' if found is None else f'{found:.4g}'}"
