"""The ablation's page: Table 2 beside the paper's numbers, the paper's claims, curves, sweeps, videos."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from avd_jax.data.atomic import write_text
from avd_jax.data.html import Html, badge, bullets, escaped, heading, paragraph, table, write_page
from avd_jax.data.latents import EncodedSet
from avd_jax.evaluation.motion import temporal_variance
from avd_jax.evaluation.style import style_position
from avd_jax.evaluation.suite import summarise
from avd_jax.experiments.ablation import Result, folder_of
from avd_jax.experiments.cells import (
    ADAPTIVE,
    CHEAPER,
    COLLAPSES,
    DMD,
    RCM,
    RCM_STEPS,
    REAL,
    REAL_OUTLINE,
    STUDENTS,
    STYLE,
    TEACHER,
    TEACHER_FEW,
    VIF,
    VIF_LATER,
    clip_method,
    collapse_method,
    k_method,
)
from avd_jax.experiments.claims import CLAIMS, CRITERION, NOT_SEEN, OPPOSITE, SEEN, Results, judge, with_spread
from avd_jax.experiments.comparison import side_by_side
from avd_jax.experiments.curves import training_charts

PAPER = {  # Table 2: steps, seconds, instance preservation, dynamic degree (VBench, in %, Wan2.1 1.3B)
    TEACHER: ("50x2", "270", "92.39", "85.56"),
    "dmd": ("4", "10.8", "88.88", "72.22"),
    "tr": ("4", "10.8", "85.38", "100.00"),
    "tr_reg": ("4", "10.8", "83.04", "78.61"),
    ADAPTIVE: ("4", "10.8", "92.39", "99.72"),
    VIF: ("4", "7.8", "91.81", "97.77"),
}
TABLE = (REAL, TEACHER, TEACHER_FEW, *STUDENTS, VIF, VIF_LATER, *RCM_STEPS)
HEADER = (
    *("method", "seeds", "steps", "s a video", "paper"),
    *("instance preservation", "paper", "dynamic degree", "paper"),
    *("caption alignment", "saturation / real", "temporal variance / real"),
)
COLOURS = {SEEN: "#2e7d4f", NOT_SEEN: "#777777", OPPOSITE: "#b0413e"}
SHOWN, SHOWN_OF_SWEEPS = 5, 2  # captions with videos; Chrome plays at most 75 in a page


def write_report(config, workdir: Path, results: Sequence[Result]) -> None:
    """Write `report.html`, `table.md` (Table 2) and `results.json` (the numbers of the report) to the workdir."""
    page = workdir / "report.html"
    ordered = sorted(results, key=lambda result: result.cell.method)  # stable: seeds stay in their order
    by_method = {method: list(group) for method, group in groupby(ordered, key=lambda result: result.cell.method)}
    numbers = _numbers(by_method)
    rows = _table_2(config, by_method, numbers)
    verdicts = [(claim, judge(claim, numbers)) for claim in CLAIMS]
    judged = [(claim.text, verdict) for claim, verdict in verdicts if verdict is not None]
    train = config.train
    about = (
        "The paper's ablation repeated in a procedural world of moving shapes, with a model a thousand times smaller "
        f"than Wan2.1 1.3B: {train.num_steps} updates of the generator in every cell at a learning rate of "
        f"{train.optimizer.learning_rate:g}, before each of them {train.fake_score_updates} of the fake score at "
        f"{train.optimizer.fake_score_learning_rate:g}, batches of {train.batch_size}, guidance "
        f"{train.guidance_scale:g}. rCM has {config.rcm.num_steps} updates, those of its warm-up cheaper, and its own "
        "rates. All rows are measured on the "
        f"same {config.evaluation.captions} captions that no training has seen, from the same noise. The paper's "
        "figures are VBench's of Wan2.1 and stand here for their order, not their size."
    )
    pieces = [
        paragraph(about),
        heading("Table 2"),
        table(HEADER, rows),
        paragraph(
            "Instance preservation, dynamic degree and alignment in %; mean ± standard deviation over the seeds. The "
            "seconds include decoding and writing the file.",
            soft=True,
        ),
        heading("The paper's claims"),
        paragraph(CRITERION, soft=True),
        bullets([_bullet(text, verdict) for text, verdict in judged]),
    ]
    shown = [method for method in TABLE if method in by_method]
    if shown:
        pieces += [heading("Videos of the first seed"), _videos(by_method, shown, page, SHOWN)]
    trained = {method: by_method[method] for method in (*STUDENTS, VIF, RCM) if method in by_method}
    if trained:
        pieces += [heading("Over training, mean of the seeds"), _curves(trained, workdir)]
    pieces += _sweeps(config, workdir, by_method, numbers, page)
    write_page(page, "Ablation in the small world", pieces)
    write_text(workdir / "table.md", _markdown(HEADER, rows))
    record = {
        "methods": {method: [_finite(row) for row in rows] for method, rows in numbers.items()},
        "claims": [
            {"claim": text, "outcome": verdict.outcome, "numbers": verdict.sentence} for text, verdict in judged
        ],
    }
    write_text(workdir / "results.json", json.dumps(record, indent=2) + "\n")


def _numbers(by_method: Mapping[str, Sequence[Result]]) -> dict[str, list[dict[str, float]]]:
    """Return for each method and seed the means over the captions, the position between the styles among them."""
    real = by_method[REAL][0].rows if REAL in by_method else None
    ends = [np.asarray(by_method[end][0].features) for end in (REAL, REAL_OUTLINE) if end in by_method]
    numbers: dict[str, list[dict[str, float]]] = {}
    for method, results in by_method.items():
        numbers[method] = []
        for result in results:
            row = summarise(result.rows, real) | {"seconds": result.seconds}
            if result.cell.seed is not None:
                row["seed"] = result.cell.seed
            if len(ends) == 2:
                row["style"] = style_position(np.asarray(result.features), start=ends[0], end=ends[1])
            numbers[method].append(row)
    return numbers


def _table_2(config, by_method: Mapping[str, Sequence[Result]], numbers: Results) -> list[list[str]]:
    few = len(config.train.student.timesteps)
    steps = {REAL: "", TEACHER: f"{config.evaluation.teacher_steps}x2", TEACHER_FEW: f"{few}x2"}
    steps |= {method: str(number) for method, number in RCM_STEPS.items()}
    rows = []
    for method in TABLE:
        if method not in by_method:
            continue
        values, paper = numbers[method], PAPER.get(method, ("", "", "", ""))
        rows.append(
            [
                by_method[method][0].cell.title,
                str(len(values)),
                steps.get(method, str(few)),
                _cell(values, "seconds", 1.0, 2),
                paper[1],
                _cell(values, "instance_preservation", 100.0, 1),
                paper[2],
                _cell(values, "dynamic_degree", 100.0, 1),
                paper[3],
                _cell(values, "alignment", 100.0, 1),
                _cell(values, "saturation/relative", 1.0, 2),
                _cell(values, "temporal_variance/relative", 1.0, 2),
            ]
        )
    return rows


def _cell(values: Sequence[Mapping[str, float]], metric: str, scale: float, digits: int) -> str:
    found = [row[metric] for row in values if metric in row and math.isfinite(row[metric])]
    return with_spread(found, scale, digits) if found else ""


def _bullet(text: str, verdict) -> Html:
    mark = badge(verdict.outcome, COLOURS[verdict.outcome])
    return Html(f"{mark} {escaped(text)} <span class=soft>{escaped(verdict.sentence)}</span>")


def _videos(by_method: Mapping[str, Sequence[Result]], methods: Sequence[str], page: Path, shown: int) -> Html:
    sets = {by_method[method][0].cell.title: by_method[method][0].videos for method in methods}
    return side_by_side(sets, page, shown)


def _curves(by_method: Mapping[str, Sequence[Result]], workdir: Path) -> Html:
    runs = {
        results[0].cell.title: [folder_of(workdir, result.cell.name) for result in results]
        for results in by_method.values()
    }
    return training_charts(runs)


def _sweeps(config, workdir: Path, by_method: Mapping, numbers: Results, page: Path) -> list[Html]:
    """Return a section for each thing that is varied, with the methods of the table that it is compared with."""
    loss = config.train.loss
    clips = [clip_method(clip) for clip in sorted(config.temporal_clips) if clip != loss.temporal_clip]
    ks = [k_method(k) for k in sorted(config.adaptive_ks) if k != loss.adaptive_k]
    collapses = [collapse_method(collapse, method) for collapse in COLLAPSES for method in (DMD, ADAPTIVE)]
    sections = (
        (f"Clip thresholds (Fig. 12); the full method's is {loss.temporal_clip:g}", [ADAPTIVE, *clips]),
        (f"k of the adaptive weight (Fig. 13); the full method's is {loss.adaptive_k:g}", [ADAPTIVE, *ks]),
        ("What might make plain DMD collapse", [DMD, ADAPTIVE, *collapses]),
        ("One rollout a cycle for fake_score", [*CHEAPER, *CHEAPER.values()]),
        ("Style transfer (Fig. 6): 0 is the painted style, 1 the outlines", [REAL, REAL_OUTLINE, ADAPTIVE, STYLE]),
    )
    pieces = []
    for title, methods in sections:
        there = [method for method in methods if method in by_method]
        if not set(there) - {DMD, ADAPTIVE, REAL, REAL_OUTLINE}:
            continue
        metrics = ("instance_preservation", "dynamic_degree", "alignment", "saturation/relative")
        metrics += ("temporal_variance/relative",)
        metrics += ("style",) if STYLE in methods else ()
        header = ["method", "seeds", *(metric.replace("_", " ").replace("/relative", " / real") for metric in metrics)]
        rows = [
            [by_method[m][0].cell.title, str(len(numbers[m])), *(_cell(numbers[m], name, 1.0, 3) for name in metrics)]
            for m in there
        ]
        trained = {method: by_method[method] for method in there if by_method[method][0].cell.train is not None}
        pieces += [heading(title), table(header, rows)]
        if "clip" in title.lower():
            pieces.append(paragraph(_scale_of_clips(workdir), soft=True))
        pieces += [_videos(by_method, there, page, SHOWN_OF_SWEEPS), _curves(trained, workdir)]
    return pieces


def _scale_of_clips(workdir: Path) -> str:
    """Return a sentence on the temporal loss of real latents, with which a clip is to be compared."""
    clips = EncodedSet(workdir / "data" / "painted" / "latents", "latents")
    variance = np.mean([temporal_variance(clips[i]["latents"].astype(np.float32)) for i in range(len(clips))])
    return (
        f"The temporal loss of the real clips is {-math.log(variance + 1e-6):.2f} here; the paper's teacher videos "
        "have about 1.5. At a clip below it the student is asked for more variance than real clips have."
    )


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _finite(row: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if math.isfinite(value)}
