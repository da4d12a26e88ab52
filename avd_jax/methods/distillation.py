"""What the methods that distil a Wan transformer share: sizes, where networks start, the teacher, what is recorded."""

from collections.abc import Mapping
from functools import partial

from avd_jax import convert
from avd_jax.convert.adapters import named_adapters, spelled
from avd_jax.convert.networks import DEFAULT
from avd_jax.data.latents import LatentsInfo
from avd_jax.data.leakage import read_texts
from avd_jax.data.mixture import named_sets, open_sets
from avd_jax.errors import UserError
from avd_jax.fields import listed, require
from avd_jax.generation.pipeline import LatentsShape
from avd_jax.methods import adapters, transformers
from avd_jax.models.functional import Denoiser, make_denoiser
from avd_jax.models.wan_dit import WAN_MODELS, WanDiTConfig
from avd_jax.paths import any_path, hub_name, is_bucket
from avd_jax.training.method import Frozen


def check_named(config) -> None:
    """Raise a UserError unless a config names weights and data."""
    require("init_from", config.init_from, None if config.init_from else "must name the teacher's weights")
    if not config.data.latents:
        raise UserError("config.data.latents is empty: give the folder that scripts/encode.py --videos wrote")


def check_accumulation(flat: Mapping) -> None:
    """Raise a UserError unless the parts of a batch divide it; `flat` is dotted field -> value."""
    parts, batch = flat["accumulation_steps"], flat["batch_size"]
    require("accumulation_steps", parts, f"must divide batch_size={batch}" if batch % parts else None)


def check_texts(config) -> None:
    """Open the sets of texts that a config names, so that a wrong folder is told of before the weights are read."""
    if config.data.prompts:
        open_sets(config.data.prompts, "prompts")
    for path in listed(config.data.held_out):
        read_texts(path)


def model_and_clips(config, video: Mapping[str, int] | None) -> tuple[WanDiTConfig, list[LatentsShape]]:
    """Return the sizes of the networks and the shapes (F, H, W, C) of the clips, before any weight is read.

    Raises:
      UserError: no such model, or a set that does not fit it.
    """
    if config.init_from:
        model = convert.dit_config(config.init_from, config.which or DEFAULT)
    elif config.model in WAN_MODELS:
        model = WAN_MODELS[config.model]
    else:
        raise UserError(f"config.model={config.model!r}: set it to one of {', '.join(WAN_MODELS)}, or set init_from")
    clips = transformers.clip_shapes(config.data.latents, video, model)
    if config.data.latents:
        _check_sets(config.data.latents, model, config.init_from)
    return model, clips


def _check_sets(named: str, model: WanDiTConfig, weights: str) -> None:
    for (folder, _), info in zip(named_sets(named), transformers.latents_infos(named), strict=True):
        *sizes, channels = info.latents_shape
        if channels != model.in_dim or info.text_dim != model.text_dim:
            raise UserError(
                f"config.data.latents={folder}: has {channels} channels and text_dim {info.text_dim}, the model of "
                f"init_from={weights} takes {model.in_dim} and {model.text_dim}; encode the videos with its weights"
            )
        if any(size % patch for size, patch in zip(sizes, model.patch_size, strict=True)):
            raise UserError(
                f"config.data.latents={folder}: the model's patch {model.patch_size} does not divide latents of "
                f"{tuple(sizes)}; encode with a height and width that are multiples of 16"
            )


def teacher_network(config, model: WanDiTConfig, mesh) -> Denoiser:
    """Return the teacher's network."""
    return make_denoiser(
        model,
        dtype=config.teacher_dtype,
        param_dtype=config.teacher_dtype,
        remat="none",
        placement=transformers.make_placement(config.attention, mesh),
    )


def start(config, mesh, shardings) -> dict:
    """Return the teacher's weights in float32, which generator and fake_score start from."""
    return transformers.load_params(config, "float32", mesh)


def teacher_parts(config, model: WanDiTConfig, teacher: Denoiser, mesh) -> dict[str, Frozen]:
    """Return the `teacher`'s parameters and the `negative` conditions that its guidance subtracts."""
    memory = config.teacher_memory
    load = partial(transformers.load_params, config, config.teacher_dtype, mesh, memory)
    return {
        "teacher": Frozen(transformers.shaped_params(teacher.abstract_params(), mesh, memory), load),
        "negative": transformers.negative_conditions(config.data.prompts or config.data.latents, model, mesh),
    }


def record(config, model: WanDiTConfig, info: LatentsInfo | None, **sampling) -> dict:
    """Return what the checkpoints say of the networks and, if the set is there, about how to sample the student.

    `sampling` is what the method adds to that.
    """
    found = {"architecture": transformers.architecture(model)}
    if config.lora.rank:
        found["architecture"]["adapters"] = adapters.record(config)
        found["base"] = {"path": _anywhere(config.init_from), "which": config.which}
        if styles := named_adapters(config.init_lora):
            found["base"]["lora"] = ",".join(spelled([(_anywhere(str(path)), strength) for path, strength in styles]))
    if info is None:
        return found
    student = {
        "timesteps": [float(t) for t in config.student.timesteps],
        "num_steps": len(config.student.timesteps),
        "shift": float(config.score.shift),
        "guidance_scale": float(config.guidance_scale),
        "frames": info.frames,
        "height": info.height,
        "width": info.width,
        "fps": float(info.fps),
    }
    return found | {"student": student | sampling}


def _anywhere(path: str) -> str:
    """Return a path of weights as it is understood in other folders too."""
    return path if not path or hub_name(path) or is_bucket(path) else str(any_path(path).absolute())


def inputs(config) -> dict[str, str]:
    """Return config field -> what identifies the weights or the set that its path leads to."""
    found = transformers.weights_fingerprints(config)
    return found | transformers.set_fingerprints(config.data.latents, config.data.prompts)
