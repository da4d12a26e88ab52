"""The README.md of an export: what the weights are, how they were trained, and how to sample from them."""

import json

from avd_jax.models.wan_dit import WAN_1_3B, WAN_14B, WanDiTConfig

_PAPER = "Adaptive Video Distillation (CVPR 2026, [arXiv 2603.21864](https://arxiv.org/abs/2603.21864))"
_BASES = {WAN_1_3B: "Wan-AI/Wan2.1-T2V-1.3B", WAN_14B: "Wan-AI/Wan2.1-T2V-14B"}

_LOAD = {
    "native": """\
```python
from wan.modules.model import WanModel  # https://github.com/Wan-Video/Wan2.1

transformer = WanModel.from_pretrained("path/to/this/folder")
```
""",
    "diffusers": """\
```python
import torch
from diffusers import WanTransformer3DModel

transformer = WanTransformer3DModel.from_pretrained(
    "path/to/this/folder", subfolder="transformer", torch_dtype=torch.bfloat16
)
```
""",
}
_SAMPLE_DIFFUSERS = """\
The scheduler re-noises each prediction to the next timestep; it must get the student's own noise levels:

```python
import functools
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained("path/to/this/folder", subfolder="scheduler")
scheduler.set_timesteps = functools.partial(scheduler.set_timesteps, sigmas={sigmas})
pipeline = WanPipeline.from_pretrained("{base}", transformer=transformer, scheduler=scheduler)
video = pipeline("a cat walks on grass", num_inference_steps={steps}, guidance_scale=1.0).frames[0]
```
"""
_SAMPLE_NATIVE = """\
Sample with a loop of its own, since Wan's solvers are for many steps:

```python
x = torch.randn(16, 21, 60, 104)
for t, t_next in zip({timesteps}, {following}):
    velocity = transformer([x], t=torch.tensor([t]), context=[prompt_embeds], seq_len=32760)[0]
    x0 = x - t / 1000 * velocity
    x = (1 - t_next / 1000) * x0 + t_next / 1000 * torch.randn_like(x0)
```
"""


def model_card(config: WanDiTConfig, *, layout: str, student: dict | None, settings: dict | None) -> str:
    """Return the model card, Markdown with the Hub's YAML header.

    Args:
      config: the transformer's sizes, which tell the base model.
      layout: "native" or "diffusers".
      student: timesteps, shift, guidance_scale and num_steps it was trained for; None for weights of no student.
      settings: of the training run, or None if they are not known.
    """
    base = _BASES.get(config)
    size = f"{config.num_layers} layers, width {config.dim}, {config.num_heads} heads"
    header = ["---", "license: apache-2.0", "pipeline_tag: text-to-video"]
    header += [f"base_model: {base}"] if base else []
    base_name = f"[{base}](https://huggingface.co/{base})" if base else f"a Wan2.1 text-to-video model ({size})"
    if student is None:
        title = "# Wan2.1 transformer"
        about = f"Weights of {base_name}, converted. They are no few-step student: sample with Wan's many-step solvers."
        sample = ""
    else:
        timesteps = [float(t) for t in student["timesteps"]]
        title = f"# {len(timesteps)}-step Wan2.1 student"
        about = _about_student(student, timesteps, base_name)
        sample = _how_to_sample(layout, timesteps, base)
    parts = ["\n".join([*header, "---"]), title, about, "## Loading", _LOAD[layout].rstrip(), sample.rstrip()]
    parts.append("`avd_jax.convert.load_dit` reads this folder too.")
    if settings:
        parts += ["## Training settings", f"```json\n{json.dumps(settings, indent=2, sort_keys=True)}\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def scheduler_config() -> dict:
    """Return diffusers' scheduler whose step is the student's: predict x0, re-noise it to the next timestep."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": "0.33.0",
        "num_train_timesteps": 1000,
        "shift": 1.0,  # the student's timesteps are shifted already
        "stochastic_sampling": True,
    }


def _about_student(student: dict, timesteps: list[float], base_name: str) -> str:
    rows = {
        "method": _PAPER,
        "base model": base_name,
        "steps": student.get("num_steps", len(timesteps)),
        "timesteps (of 1000; noise level = timestep / 1000)": ", ".join(f"{t:g}" for t in timesteps),
        "timestep shift in training": student.get("shift", "not recorded"),
        "guidance scale in training": student.get("guidance_scale", "not recorded"),
        "guidance when sampling": "none: it is distilled into the weights (guidance scale 1)",
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def _how_to_sample(layout: str, timesteps: list[float], base: str | None) -> str:
    if layout == "diffusers":
        return _SAMPLE_DIFFUSERS.format(
            sigmas=[t / 1000 for t in timesteps], steps=len(timesteps), base=f"{base or 'path/to/wan2.1'}-Diffusers"
        )
    return _SAMPLE_NATIVE.format(timesteps=timesteps, following=[*timesteps[1:], 0.0])
