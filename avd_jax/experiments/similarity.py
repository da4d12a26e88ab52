"""A page of violins: how alike neighbouring frames are in the predictions of some models, step by step."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from avd_jax.data.atomic import write_text
from avd_jax.data.html import COLOURS, Html, charts, escaped, paragraph, table, write_page
from avd_jax.generation.predictions import Step

MOST_VIOLINS = 10  # of a model; of more steps so many are shown, evenly chosen
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 535.0, 28.0, 220.0
_POINTS = 80  # of a violin's outline


def write(steps: Mapping[str, Sequence[Step]], out: Path, *, about: str) -> Path:
    """Write similarity.json and similarity.html; returns the page.

    Args:
      steps: name of a model -> its steps.
      out: folder.
      about: a sentence on what was sampled.

    Raises:
      UserError: the page cannot be written.
    """
    record = {
        name: [{"timestep": step.timestep, "similarities": np.round(step.similarities, 6).tolist()} for step in found]
        for name, found in steps.items()
    }
    low = min(step.similarities.min() for found in steps.values() for step in found)
    figures = [
        violins(name, found, low=float(low), colour=COLOURS[i % len(COLOURS)])
        for i, (name, found) in enumerate(steps.items())
    ]
    rows = [
        (name, f"{step.timestep:g}", *(f"{value:.3f}" for value in np.percentile(step.similarities, (5, 50, 95))))
        for name, found in steps.items()
        for step in _shown(found)
    ]
    pieces = [
        paragraph(about),
        paragraph(
            "Cosine similarity of neighbouring latent frames in the x0 that the model predicts at each step, of all "
            "videos and frames; the wider, the more of them. The bar is the median.",
            soft=True,
        ),
        charts(figures),
        table(("model", "timestep", "5 %", "median", "95 %"), rows),
    ]
    page = out / "similarity.html"
    write_page(page, "Neighbouring frames at each denoising step", pieces)
    write_text(out / "similarity.json", json.dumps(record) + "\n")
    return page


def violins(title: str, steps: Sequence[Step], *, low: float, colour: str) -> Html:
    """Return a violin for each step as inline SVG, from the first at the left to the last; its axis is `low` to 1."""
    shown = _shown(steps)
    spacing = 0.2 if low < 0 else 0.1 if low < 0.8 else 0.05
    bottom = np.floor(low / spacing + 1e-9) * spacing
    bottom = min(bottom, 1 - spacing)

    def place(value: float) -> float:
        return _BOTTOM + (value - bottom) / (1 - bottom) * (_TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 545 262" role="img" aria-label="{escaped(title)}">']
    parts.append(f'<text x="{_LEFT}" y="14" style="font-weight:600">{escaped(title)}</text>')
    for value in np.arange(bottom, 1 + spacing / 2, spacing):
        y = place(value)
        parts.append(f'<line x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    width = (_RIGHT - _LEFT) / len(shown)
    for i, step in enumerate(shown):
        x, values = _LEFT + (i + 0.5) * width, step.similarities.ravel()
        heights, shares = density(values)
        half = 0.44 * min(width, 90) * shares
        sides = [*zip(x + half, heights, strict=True), *zip(x - half[::-1], heights[::-1], strict=True)]
        outline = " ".join(f"{at:.1f},{place(value):.1f}" for at, value in sides)
        parts.append(f'<polygon points="{outline}" fill="{colour}" fill-opacity=".35" stroke="{colour}"/>')
        y, bar = place(float(np.median(values))), 0.15 * min(width, 90)
        ends = f'x1="{x - bar:.1f}" x2="{x + bar:.1f}" y1="{y:.1f}" y2="{y:.1f}"'
        parts.append(f'<line {ends} stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{x:.1f}" y="{_BOTTOM + 16}" text-anchor="middle">{step.timestep:.0f}</text>')
    parts.append(f'<text x="{_RIGHT}" y="{_BOTTOM + 32}" text-anchor="end">timestep</text>')
    return Html(f"<figure>{''.join(parts)}</svg></figure>")


def density(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return places between the smallest and the largest value, and how dense the values [N] are there; at most 1.

    It is a sum of Gaussians, as wide as Silverman's rule has them.
    """
    places = np.linspace(values.min(), values.max(), _POINTS)
    quarter, three = np.percentile(values, (25, 75))
    spread = min(values.std(), (three - quarter) / 1.34) or values.std()
    width = max(0.9 * spread * len(values) ** -0.2, 1e-6)
    found = np.exp(-0.5 * ((places[:, None] - values) / width) ** 2).sum(1)
    return places, found / found.max()


def _shown(steps: Sequence[Step]) -> list[Step]:
    chosen = np.unique(np.rint(np.linspace(0, len(steps) - 1, min(MOST_VIOLINS, len(steps)))).astype(int))
    return [steps[i] for i in chosen]
