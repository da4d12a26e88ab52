"""Every field of a training config: its default (the paper's value where the paper has one) and its help line.

A file in `configs/` starts from `default_config()` and changes what it must. A field that is not listed here does not
exist: setting it is an error that names the closest one.
"""

import math

import ml_collections

from avd_jax.diffusion.student import DEFAULT_HALF_RATE_POSITIONS, HALF_RATE_POSITIONS, StudentSchedule
from avd_jax.errors import UserError, closest
from avd_jax.models.wan_dit import REMAT_POLICIES, WAN_MODELS
from avd_jax.parallel.memory import MEMORIES
from avd_jax.training.fields import check_names, config_from

FIELDS: dict[str, tuple[object, str]] = {
    "seed": (0, "decides the order of the data and all noise"),
    "num_steps": (1000, "generator updates in the run"),
    "batch_size": (8, "examples an update, over all devices"),
    "accumulation_steps": (1, "parts that a batch is cut into to save memory; gradients are averaged"),
    "init_from": ("", "weights of the teacher, which all three networks start from, in any layout; sets the sizes"),
    "model": ("", f"what aot_compile.py compiles where init_from is empty: {', '.join(WAN_MODELS)}"),
    "data.latents": ("", "folder of encoded videos (scripts/encode.py --videos), for the regression loss"),
    "data.prompts": (
        "",
        "folder of encoded prompts (scripts/encode.py --prompts); empty: the captions of data.latents",
    ),
    "data.shapes_world.clips": (0, "without data.latents: encode so many clips of the built-in moving shapes"),
    "data.shapes_world.prompts": (0, "and so many of its captions as prompts"),
    "data.shapes_world.frames": (17, "video frames a clip, 4n + 1"),
    "data.shapes_world.height": (64, "pixels, a multiple of 16"),
    "data.shapes_world.width": (64, "pixels, a multiple of 16"),
    "data.shapes_world.fps": (16, "frames a second"),
    "student.timesteps": ((1000.0, 900.0, 757.0, 522.0), "timesteps (1000 sigma) of the student's steps"),
    "half_rate.steps": (0, "first steps of the student that see every second frame, in training too; 0: none"),
    "half_rate.positions": (
        DEFAULT_HALF_RATE_POSITIONS,
        "of these frames in the rotary embedding: " + ", ".join(HALF_RATE_POSITIONS),
    ),
    "half_rate.interpolator": ("", "weights that make the other frames, in any layout; they stay with the student"),
    "score.shift": (5.0, "timestep shift of the random timesteps at which teacher and fake_score are compared"),
    "score.min_timestep": (20.0, "lower bound of these timesteps, of 1000"),
    "score.max_timestep": (980.0, "upper bound of these timesteps, of 1000"),
    "guidance_scale": (5.0, "guidance of the teacher, in Wan's convention uncond + scale * (cond - uncond)"),
    "fake_score_updates": (5, "updates of fake_score before each update of the generator"),
    "loss.distribution_matching": (1.0, "weight of L_KL, Eq. 4; 0 switches the term off"),
    "loss.regression": (2.0, "weight of L_reg, Eq. 9; 0 switches the term off and its forward pass"),
    "loss.regression_weighting": ("adaptive", "'adaptive' (Eqs. 5-7) or 'fixed' (w = 1, the ablation)"),
    "loss.adaptive_k": (3.0, "steepness k of the adaptive weight"),
    "loss.adaptive_alpha": (0.95, "share of the old mean that stays in the loss history"),
    "loss.adaptive_uses": ("before", "the weight uses the mean 'before' the update (paper) or 'after' it (authors)"),
    "loss.temporal": (0.05, "weight of L_temp, Eq. 8; 0 switches the term off"),
    "loss.temporal_clip": (0.6, "L_temp gives no gradient at or below this; -inf never truncates"),
    "optimizer.learning_rate": (2e-6, "AdamW's learning rate of the generator"),
    "optimizer.fake_score_learning_rate": (2e-6, "AdamW's learning rate of fake_score"),
    "optimizer.beta1": (0.9, "AdamW's decay of the first moment"),
    "optimizer.beta2": (0.999, "AdamW's decay of the second moment"),
    "optimizer.epsilon": (1e-8, "AdamW's epsilon"),
    "optimizer.weight_decay": (0.01, "AdamW's decoupled weight decay (PyTorch's default; the paper names none)"),
    "optimizer.max_grad_norm": (10.0, "gradients are scaled down to this global norm"),
    "ema_decay": (0.0, "decay of the running mean of the generator's weights; 0 keeps none"),
    "compute_dtype": ("bfloat16", "dtype of matrix products; masters and moments are float32"),
    "teacher_dtype": ("bfloat16", "dtype in which the frozen teacher is stored and run"),
    "teacher_memory": ("device", "where the teacher's layers wait: 'device', or 'host', which sends one at a time"),
    "remat": ("block", "what the backward pass keeps of a block: " + ", ".join(REMAT_POLICIES)),
    "mesh.data": (-1, "devices along the data axis; -1: all that the others leave"),
    "mesh.fsdp": (1, "devices along the axis that shares parameters and batch; with seq -1 too: as the batch allows"),
    "mesh.seq": (1, "devices along the axis that shares parameters and tokens; must divide the heads (12 or 40)"),
    "attention.kernel": ("auto", "'auto' chooses by platform: 'splash' on TPU, 'cudnn' on CUDA, 'xla' elsewhere"),
    "attention.forward_blocks": ((1024, 2048, 512), "splash: queries, keys, and keys at a time (tune_attention.py)"),
    "attention.backward_blocks": ((1024, 2048, 512), "splash, backward: likewise"),
    "attention.fused_backward": (True, "splash: one backward kernel, which needs more memory, instead of two"),
    "log_every": (1, "generator updates between two lines of metrics.jsonl"),
    "checkpoint_every": (100, "generator updates between two checkpoints; 0: only at the end and on SIGTERM"),
    "checkpoint.keep": (2, "newest checkpoints to keep"),
    "checkpoint.best_metric": ("", "keep the best checkpoint by this metric too, such as 'loss/regression'"),
    "checkpoint.best_mode": ("min", "whether the best is the 'min' or the 'max'"),
    "meters.temporal_variance": ((0.5, 2.0), "band of the student's variance along frames, as a share of real videos'"),
    "meters.saturation": (
        (0.7, 1.4),
        "band of its mean HSV saturation; a meter that leaves its band is a warning line",
    ),
    "meters.colourfulness": ((0.7, 1.4), "band of its colourfulness (Hasler and Suesstrunk)"),
    "meters.latent_temporal_variance": ((0.4, 2.0), "band of the variance of its latents along frames"),
    "meters.latent_spread": ((0.7, 1.4), "band of the deviation of its latents over height and width"),
    "max_nonfinite": (10, "updates in a row that may be skipped for a non-finite loss before the run stops"),
    "sample_every": (100, "generator updates between two sets of sample videos, the last update has one too; 0: never"),
    "sample.prompts": (4, "prompts to sample: the first ones of data.prompts"),
    "sample.vae": ("", "weights of the VAE that decodes the samples; empty: those beside init_from"),
    "sample.teacher_steps": (50, "UniPC steps of the teacher's videos that stand beside them; 0: no teacher"),
    "sample.teacher_shift": (5.0, "timestep shift of the teacher's solver"),
}


def default_config() -> ml_collections.ConfigDict:
    """Return a config with every field at its default; fields can be set, not added."""
    return config_from(FIELDS)


def validate(config) -> None:
    """Check a config that is to be trained with, as far as it can be checked without files or devices.

    Raises:
      UserError: naming the field and what it may be.
    """
    check_values(config)
    _check({"init_from": config.init_from}, "init_from", config.init_from, "must name the teacher's weights")
    if not config.data.latents and not config.data.shapes_world.clips:
        raise UserError("config.data.latents is empty: give the folder that scripts/encode.py --videos wrote")


def check_values(config) -> None:
    """Check every value by itself, whether or not weights and data are named.

    Raises:
      UserError: naming the field and what it may be.
    """
    flat = check_names(config, FIELDS)
    positive = ("num_steps", "batch_size", "accumulation_steps", "log_every", "max_nonfinite", "checkpoint.keep")
    for name in positive:
        _check(flat, name, flat[name] >= 1, "must be at least 1")
    _check(flat, "sample.prompts", flat["sample.prompts"] >= 1, "must be at least 1; sample_every=0 samples nothing")
    not_negative = [name for name in flat if name.startswith(("loss.", "optimizer.")) and _is_number(flat[name])]
    not_negative += ["checkpoint_every", "sample_every", "fake_score_updates", "sample.teacher_steps"]
    for name in not_negative:
        if name != "loss.temporal_clip":
            _check(flat, name, flat[name] >= 0 and math.isfinite(flat[name]), "must be 0 or a positive number")
    for name, choices in (
        ("loss.regression_weighting", ("adaptive", "fixed")),
        ("loss.adaptive_uses", ("before", "after")),
        ("compute_dtype", ("float32", "bfloat16")),
        ("teacher_dtype", ("float32", "bfloat16")),
        ("checkpoint.best_mode", ("min", "max")),
        ("teacher_memory", tuple(MEMORIES)),
        ("remat", tuple(REMAT_POLICIES)),
        ("half_rate.positions", tuple(HALF_RATE_POSITIONS)),
    ):
        _check(flat, name, flat[name] in choices, f"must be one of {', '.join(choices)}{closest(flat[name], choices)}")
    _check(flat, "seed", 0 <= flat["seed"] < 2**32, "must be 0..2^32 - 1")
    _check(flat, "guidance_scale", math.isfinite(flat["guidance_scale"]), "must be a number")
    for name in ("ema_decay", "loss.adaptive_alpha", "optimizer.beta1", "optimizer.beta2"):
        _check(flat, name, 0 <= flat[name] < 1, "must be at least 0 and below 1")
    bounds = 0 < flat["score.min_timestep"] <= flat["score.max_timestep"] <= 1000
    _check(
        flat, "score.min_timestep", bounds, f"and score.max_timestep={flat['score.max_timestep']} must rise in 0..1000"
    )
    _check(flat, "score.shift", 0 < flat["score.shift"] < math.inf, "must be positive")
    _check(flat, "sample.teacher_shift", 0 < flat["sample.teacher_shift"] < math.inf, "must be positive")
    _check(flat, "loss.temporal_clip", not math.isnan(flat["loss.temporal_clip"]), "must be a number")
    for name in (name for name in flat if name.startswith("meters.")):
        low, high = flat[name]
        _check(flat, name, low < 1 < high, "must be two numbers, below and above 1")
    parts, batch = flat["accumulation_steps"], flat["batch_size"]
    _check(flat, "accumulation_steps", batch % parts == 0, f"must divide batch_size={batch}")
    if not any(flat[f"loss.{term}"] for term in ("distribution_matching", "regression", "temporal")):
        raise UserError("config.loss: every term has weight 0, nothing would be trained; set one of them")
    num_steps = len(StudentSchedule(tuple(config.student.timesteps)).timesteps)
    _check(flat, "half_rate.steps", 0 <= flat["half_rate.steps"] <= num_steps, f"must be 0 to {num_steps}")
    if flat["half_rate.steps"] and not flat["half_rate.interpolator"]:
        raise UserError("config.half_rate.interpolator is empty: give weights, see scripts/train_interpolator.py")


def _check(flat: dict, name: str, holds: bool, message: str) -> None:
    if not holds:
        raise UserError(f"config.{name}={flat[name]!r} {message}")


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
