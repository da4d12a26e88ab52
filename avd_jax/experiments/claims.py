"""What the paper claims, and whether the ablation's numbers show it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from avd_jax.experiments.cells import (
    ADAPTIVE,
    CHEAPER,
    DMD,
    FIXED,
    RCM,
    STUDENTS,
    STYLE,
    TEACHER,
    TEACHER_FEW,
    TR,
    VIF,
)

# method -> for each seed, metric -> mean over the captions, and `seed` of what was trained
Results = Mapping[str, Sequence[Mapping[str, float]]]

SEEN, NOT_SEEN, OPPOSITE = "seen here", "not seen", "opposite"
LEAST_DIFFERENCE = 0.02  # of metrics that are shares: two of a hundred captions
CRITERION = (
    "A claim that one method is above another is seen here where the difference of their means over the seeds that "
    "both have is larger than the margin, opposite where it is that much in the other direction, else not seen. The "
    f"margin is the pooled standard deviation over all seeds, but at least {LEAST_DIFFERENCE:g}. A claim that one "
    "method is as good as another is seen where it is not below it by more than the margin, else opposite."
)
METHOD_NAMES = {
    TEACHER: "teacher",
    TEACHER_FEW: "teacher at few steps",
    **{method: title for method, (title, _) in STUDENTS.items()},
    VIF: "Full+VIF",
    RCM: "rCM",
    "rcm_2": "rCM with 2 steps",
    "rcm_1": "rCM with 1 step",
    **{name: f"{STUDENTS[method][0]} with one rollout a cycle" for method, name in CHEAPER.items()},
    "clip_none": "no clip",
    STYLE: "style transfer",
}
METRIC_NAMES = {
    "alignment": "Caption alignment",
    "instance_preservation": "Instance preservation",
    "dynamic_degree": "Dynamic degree",
    "saturation/relative": "Saturation over real",
    "temporal_variance/relative": "Temporal variance over real",
    "style": "Position between the styles (0 painted, 1 outline)",
}


@dataclass(frozen=True)
class Claim:
    """That `higher` is above `lower` by a metric or, if `as_good`, not below it."""

    text: str
    metric: str
    higher: str
    lower: str
    as_good: bool = False


@dataclass(frozen=True)
class Verdict:
    """One of SEEN, NOT_SEEN, OPPOSITE, and the numbers that it follows from in a sentence."""

    outcome: str
    sentence: str


CLAIMS = (
    Claim("Plain DMD loses motion.", "dynamic_degree", TEACHER, DMD),
    Claim("Plain DMD loses instances.", "instance_preservation", TEACHER, DMD),
    Claim("Plain DMD oversaturates: its colours are above the teacher's.", "saturation/relative", DMD, TEACHER),
    Claim("The temporal regularisation brings the motion back.", "dynamic_degree", TR, DMD),
    Claim("Alone it costs instance preservation.", "instance_preservation", DMD, TR),
    Claim("A regression of fixed weight takes motion away again.", "dynamic_degree", TR, FIXED),
    Claim("And it does not help instance preservation.", "instance_preservation", TR, FIXED),
    Claim("With the adaptive weight more instances are preserved.", "instance_preservation", ADAPTIVE, FIXED),
    Claim("With the adaptive weight there is more motion.", "dynamic_degree", ADAPTIVE, FIXED),
    Claim("The full method preserves instances as the teacher does.", "instance_preservation", ADAPTIVE, TEACHER, True),
    Claim("The full method moves as much as the teacher.", "dynamic_degree", ADAPTIVE, TEACHER, True),
    Claim("The full method's colours are less saturated than plain DMD's.", "saturation/relative", DMD, ADAPTIVE),
    Claim("The student follows captions better than the teacher at as few steps.", "alignment", ADAPTIVE, TEACHER_FEW),
    Claim("And it preserves more instances.", "instance_preservation", ADAPTIVE, TEACHER_FEW),
    Claim("Frame interpolation keeps instance preservation.", "instance_preservation", VIF, ADAPTIVE, True),
    Claim("Frame interpolation keeps motion.", "dynamic_degree", VIF, ADAPTIVE, True),
    Claim("The full method preserves more instances than rCM.", "instance_preservation", ADAPTIVE, RCM),
    Claim("The full method moves more than rCM.", "dynamic_degree", ADAPTIVE, RCM),
    Claim("rCM follows captions as plain DMD does.", "alignment", RCM, DMD, True),
    Claim("rCM keeps more variety: its motion is not below the teacher's.", "dynamic_degree", RCM, TEACHER, True),
    Claim("The same student of rCM preserves instances with 2 steps.", "instance_preservation", "rcm_2", RCM, True),
    Claim("And with 1 step.", "instance_preservation", "rcm_1", RCM, True),
    *(
        Claim(f"One rollout a cycle for fake_score keeps the {what} of {of}.", metric, CHEAPER[method], method, True)
        for method, of in ((ADAPTIVE, "the full method"), (DMD, "plain DMD"))
        for what, metric in (
            ("instances", "instance_preservation"),
            ("motion", "dynamic_degree"),
            ("alignment", "alignment"),
        )
    ),
    Claim("Without the clip, content vanishes (Fig. 12).", "instance_preservation", ADAPTIVE, "clip_none"),
    Claim("Without the clip, frames jump (Fig. 12).", "temporal_variance/relative", "clip_none", ADAPTIVE),
    Claim("A regression on another style moves the student there (Fig. 6).", "style", STYLE, ADAPTIVE),
)


def judge(claim: Claim, results: Results) -> Verdict | None:
    """Return whether the results show the claim, or None if one of its methods has no results."""
    rows = [[row for row in results.get(name, ()) if claim.metric in row] for name in (claim.higher, claim.lower)]
    if not all(rows):
        return None
    margin = max(pooled_spread(*([row[claim.metric] for row in side] for side in rows)), LEAST_DIFFERENCE)
    seeds = [{row.get("seed") for row in side} for side in rows]
    common = set.intersection(*seeds) or set.union(*seeds)  # the teacher has none
    higher, lower = ([row[claim.metric] for row in side if row.get("seed") in common] for side in rows)
    difference = float(np.mean(higher) - np.mean(lower))
    if claim.as_good:
        outcome = SEEN if difference >= -margin else OPPOSITE
    else:
        outcome = SEEN if difference > margin else OPPOSITE if difference < -margin else NOT_SEEN
    name = METRIC_NAMES[claim.metric]
    sides = ((claim.higher, higher), (claim.lower, lower))
    first, second = (f"{METHOD_NAMES.get(method, method)} {with_spread(values)}" for method, values in sides)
    return Verdict(outcome, f"{name}: {first}, {second}; difference {difference:+.3f}, margin {margin:.3f}.")


def pooled_spread(*groups: Sequence[float]) -> float:
    """Return the root of the mean variance within the groups, weighted by degrees of freedom; 0 if there is none."""
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum(float(np.var(group)) * len(group) for group in groups)
    return math.sqrt(squares / freedom) if freedom else 0.0


def with_spread(values: Sequence[float], scale: float = 1.0, digits: int = 3) -> str:
    """Return mean and, of several values, standard deviation, as text."""
    mean = f"{scale * float(np.mean(values)):.{digits}f}"
    return f"{mean} ± {scale * float(np.std(values, ddof=1)):.{digits}f}" if len(values) > 1 else mean
