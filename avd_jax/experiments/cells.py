"""The cells of the ablation: what is trained, with which settings, and how each result is sampled.

The methods are those of the paper's Table 2, each with the losses of the ones before and one more; the clip thresholds
(Fig. 12), k (Fig. 13) and the style transfer (Fig. 6) change one thing of the full method. What might make plain DMD
collapse (a longer training, a higher guidance, fewer prompts) is tried with plain DMD and with the full method, and so
is fake_score's cheaper cycle, whose updates share one rollout. rCM
stands beside them, with the settings of the others where both have them; one student of it serves 4, 2 and 1 steps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import ml_collections

from avd_jax.data.inputs import check_clip_size
from avd_jax.data.world_clips import WORLD_SIZE
from avd_jax.errors import UserError
from avd_jax.fields import Field, Fields, at_least, check_values, config_from, flatten, positive
from avd_jax.methods.avd import config as avd
from avd_jax.methods.distillation_fields import DISTILLATION_FIELDS
from avd_jax.methods.rcm import config as rcm
from avd_jax.training.config import RUN_FIELDS


def _seeds(value) -> str | None:
    return None if value and len(set(value)) == len(value) else "must be different numbers, at least one"


FIELDS: Fields = {
    "seeds": Field((0, 1, 2), "seeds of each method of Table 2", _seeds),
    "sweep_seeds": Field(
        (0,), "those of them for the cells that vary clip, k, style and what might make DMD collapse", _seeds
    ),
    "temporal_clips": Field((-math.inf, 1.2, 1.0, 0.4), "clips to try besides train.loss.temporal_clip; -inf: none"),
    "adaptive_ks": Field((1.0, 10.0), "k to try besides train.loss.adaptive_k"),
    "world.clips": Field(128, "clips of the built-in world for the regression loss of every training", at_least(1)),
    "world.prompts": Field(256, "captions of further clips, the prompts of every training", at_least(1)),
    "world.frames": Field(WORLD_SIZE["frames"], "video frames of these clips and of all videos that are made, 4n + 1"),
    "world.height": Field(WORLD_SIZE["height"], "their pixels, a multiple of 16"),
    "world.width": Field(WORLD_SIZE["width"], "their pixels, a multiple of 16"),
    "world.fps": Field(WORLD_SIZE["fps"], "their frames a second", positive),
    "style.clips": Field(
        64, "clips of the outline style for the regression loss of the style transfer; 0: no such cells", at_least(0)
    ),
    "style.regression": Field(2.0, "weight of L_reg in the style transfer"),
    "collapse.num_steps": Field(240, "a longer training, of DMD and of the full method; 0: no such cells", at_least(0)),
    "collapse.guidance_scale": Field(6.0, "a higher guidance of the teacher, for both; 0: no such cells", at_least(0)),
    "collapse.prompts": Field(8, "so few prompts, for both; 0: no such cells", at_least(0)),
    "cheaper": Field(False, "whether plain DMD and the full method are trained with fake_score_samples='a_cycle', too"),
    "evaluation.captions": Field(100, "held-out captions on which everything is measured", at_least(1)),
    "evaluation.batch_size": Field(10, "videos to sample together", at_least(1)),
    "evaluation.teacher_steps": Field(
        50, "UniPC steps of the teacher; a second row has as many as the student", at_least(1)
    ),
    **{f"train.{name}": entry for name, entry in avd.FIELDS.items()},
    "rcm.num_steps": Field(0, "generator updates of rCM, whose warm-up is cheap; 0: no such cells", at_least(0)),
    **{f"rcm.{name}": entry for name, entry in rcm.FIELDS.items() if name not in (RUN_FIELDS | DISTILLATION_FIELDS)},
}

TEACHER, TEACHER_FEW, REAL, REAL_OUTLINE, STYLE = "teacher", "teacher_few", "real", "real_outline", "style"
DMD, TR, FIXED, ADAPTIVE = "dmd", "tr", "tr_reg", "tr_ada"
VIF, VIF_LATER = "full_vif", "vif_later"
RCM = "rcm"
STUDENTS = {  # method -> title, and what it changes in the config of the full method
    DMD: ("DMD", {"loss.regression": 0.0, "loss.temporal": 0.0}),
    TR: ("+TR", {"loss.regression": 0.0}),
    FIXED: ("+TR+RegLoss", {"loss.regression_weighting": "fixed"}),
    ADAPTIVE: ("+TR+AdaLoss", {}),
}
RCM_STEPS = {RCM: 4, "rcm_2": 2, "rcm_1": 1}  # method -> steps of the one student
CHEAPER = {method: f"cheaper_{method}" for method in (DMD, ADAPTIVE)}  # method -> that with a cheaper cycle
LONG, GUIDED, FEW = "long", "guided", "few"
COLLAPSES = {LONG: "longer", GUIDED: "more guidance", FEW: "few prompts"}  # what may make DMD collapse, for people


@dataclass(frozen=True)
class Cell:
    """One thing to make videos with, and to train before that if it says so.

    Attributes:
      method: what it belongs to; its results are averaged over the seeds.
      title: the method's, for people.
      seed: None if nothing is trained.
      train: config of the training, or None.
      student: name of the cell whose student makes the videos; None for the teacher and for drawn clips.
      sampling: fields of `Options` beside the weights.
      style: of the drawn clips, or None.
    """

    method: str
    title: str
    seed: int | None = None
    train: ml_collections.ConfigDict | None = None
    student: str | None = None
    sampling: Mapping[str, object] = field(default_factory=dict)
    style: str | None = None

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.method if self.seed is None else f"{self.method}_seed{self.seed}"


def default_config() -> ml_collections.ConfigDict:
    """Return a config with every field at its default; fields can be set, not added."""
    return config_from(FIELDS)


def validate(config) -> None:
    """Check what can be checked without files (UserError names the field)."""
    flat, world = check_values(config, FIELDS), config.world
    if set(flat["sweep_seeds"]) - set(flat["seeds"]):
        raise UserError(f"config.sweep_seeds={flat['sweep_seeds']} must be among config.seeds={flat['seeds']}")
    check_clip_size(frames=world.frames, height=world.height, width=world.width, prefix="config.world.")
    for name in ("train.data.latents", "train.data.prompts"):
        if flat[name]:
            raise UserError(f"config.{name} must be empty: the ablation encodes clips and prompts of config.world")
    try:
        avd.validate(_with(config.train, painted_sets(Path("data"))))
    except UserError as error:
        raise UserError(str(error).replace("config.", "config.train.", 1)) from None
    if config.rcm.num_steps:
        try:
            rcm.validate(_rcm_config(config, Path("data"), 0))
        except UserError as error:
            raise UserError(str(error).replace("config.", "config.rcm.", 1)) from None


def plan(config, data: Path, *, interpolator: bool) -> list[Cell]:
    """Return the cells in the order in which they are run: the table first, seed by seed.

    Args:
      config: validated.
      data: folder of the encoded sets: `painted/`, `outline/` and that of `few_prompts`.
      interpolator: whether one lies with the teacher's weights; without it there is no frame interpolation.
    """
    train, steps = config.train, config.evaluation.teacher_steps
    few = len(train.student.timesteps)
    guided = {"solver": "unipc", "shift": train.sample.teacher_shift, "guidance_scale": train.guidance_scale}
    cells = [
        Cell(REAL, "Real", style="painted"),
        Cell(TEACHER, "Teacher", sampling={**guided, "steps": steps}),
        Cell(TEACHER_FEW, "Teacher, few steps", sampling={**guided, "steps": few}),
    ]
    for seed in config.seeds:
        cells += [_student(config, data, method, title, seed, changes) for method, (title, changes) in STUDENTS.items()]
        if interpolator:
            half_rate = {"half_rate.steps": few // 2, "half_rate.interpolator": train.init_from}
            cells.append(_student(config, data, VIF, "Full+VIF", seed, half_rate))
            later = {"solver": "student", "half_rate_steps": few // 2}
            student = f"{ADAPTIVE}_seed{seed}"
            cells.append(Cell(VIF_LATER, "+TR+AdaLoss, VIF only when sampling", seed, student=student, sampling=later))
        if config.rcm.num_steps:
            cells += _rcm_cells(config, data, seed)
        if config.cheaper:
            for method, name in CHEAPER.items():
                title, changes = STUDENTS[method]
                changes = {**changes, "fake_score_samples": "a_cycle"}
                cells.append(_student(config, data, name, f"{title}, one rollout a cycle", seed, changes))
    for seed in config.sweep_seeds:
        sweep = {clip_method(clip): (f"clip {_clip(clip)}", {"loss.temporal_clip": clip}) for clip in _clips(config)}
        sweep |= {k_method(k): (f"k = {k:g}", {"loss.adaptive_k": k}) for k in _ks(config)}
        cells += [_student(config, data, method, title, seed, changes) for method, (title, changes) in sweep.items()]
        if config.style.clips:
            changes = {"data.latents": str(data / "outline" / "latents"), "loss.regression": config.style.regression}
            cells.append(_student(config, data, STYLE, "Full, outline style", seed, changes))
        for collapse, condition in _collapses(config, data).items():
            for method in (DMD, ADAPTIVE):
                title, changes = STUDENTS[method]
                name, title = collapse_method(collapse, method), f"{title}, {COLLAPSES[collapse]}"
                cells.append(_student(config, data, name, title, seed, {**changes, **condition}))
    if config.style.clips:
        cells.append(Cell(REAL_OUTLINE, "Real, outline style", style="outline"))
    return cells


def clip_method(clip: float) -> str:
    """Return the name of the method with another clip."""
    return f"clip_{_clip(clip)}"


def k_method(k: float) -> str:
    """Return the name of the method with another k."""
    return f"k_{k:g}"


def collapse_method(collapse: str, method: str) -> str:
    """Return the name of a method under one of COLLAPSES."""
    return f"{collapse}_{method}"


def painted_sets(data: Path) -> dict[str, str]:
    """Return field -> the set that a training takes, if nothing else is said, given the folder of all sets."""
    return {f"data.{kind}": str(data / "painted" / kind) for kind in ("latents", "prompts")}


def few_prompts(config, data: Path) -> Path:
    """Return the folder of the set of few prompts, given that of all sets."""
    return data / f"prompts_{config.collapse.prompts}"


def _collapses(config, data: Path) -> dict[str, dict[str, object]]:
    """Return what each of COLLAPSES that is wanted changes."""
    wanted = config.collapse
    changes = {
        LONG: wanted.num_steps and {"num_steps": wanted.num_steps},
        GUIDED: wanted.guidance_scale and {"guidance_scale": wanted.guidance_scale},
        FEW: wanted.prompts and {"data.prompts": str(few_prompts(config, data))},
    }
    return {collapse: change for collapse, change in changes.items() if change}


def _clip(clip: float) -> str:
    return "none" if clip == -math.inf else f"{clip:g}"


def _clips(config) -> list[float]:
    return [clip for clip in config.temporal_clips if clip != config.train.loss.temporal_clip]


def _ks(config) -> list[float]:
    return [k for k in config.adaptive_ks if k != config.train.loss.adaptive_k]


def _student(config, data: Path, method: str, title: str, seed: int, changes: Mapping[str, object]) -> Cell:
    train = _with(config.train, {"seed": seed, **painted_sets(data), **changes})
    half_rate = {"half_rate_steps": train.half_rate.steps}  # an interpolator beside the weights changes nothing
    return Cell(method, title, seed, train, f"{method}_seed{seed}", {"solver": "student", **half_rate})


def _rcm_cells(config, data: Path, seed: int) -> list[Cell]:
    """Return the training of rCM with its videos of most steps, then those of fewer."""
    train, student, cells = _rcm_config(config, data, seed), f"{RCM}_seed{seed}", []
    for method, steps in RCM_STEPS.items():
        sampling = {"solver": "student", "half_rate_steps": 0, "steps": steps}
        own = train if method == RCM else None
        cells.append(Cell(method, f"rCM, {steps} step{'s' * (steps > 1)}", seed, own, student, sampling))
    return cells


def _rcm_config(config, data: Path, seed: int) -> ml_collections.ConfigDict:
    """Return the config of a training by rCM: what is its own, and for the rest the other trainings'."""
    shared = {name: value for name, value in flatten(config.train).items() if name in RUN_FIELDS | DISTILLATION_FIELDS}
    return _with(
        rcm.default_config(), shared | {"method": "rcm", "seed": seed} | painted_sets(data) | flatten(config.rcm)
    )


def _with(config, changes: Mapping[str, object]) -> ml_collections.ConfigDict:
    """Return a copy of a config in which these fields, dotted name -> value, are changed."""
    changed = config.copy_and_resolve_references()
    for name, value in changes.items():
        *parents, leaf = name.split(".")
        node = changed
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return changed
