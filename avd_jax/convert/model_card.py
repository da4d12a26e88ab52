"""The README.md of an export: what the weights are, how they were trained, and how to sample from them."""

import json
from collections.abc import Mapping, Sequence

from avd_jax.models.wan_dit import WAN_1_3B, WAN_14B, WanDiTConfig

_PAPERS = {
    "avd": "Adaptive Video Distillation (CVPR 2026, [arXiv 2603.21864](https://arxiv.org/abs/2603.21864))",
    "rcm": "rCM ([arXiv 2510.08431](https://arxiv.org/abs/2510.08431))",
}
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
    "comfyui": """\
Copy `diffusion_models/{file}` to ComfyUI's `models/diffusion_models/` and open it with the node Load Diffusion Model,
weight dtype `default`. Text encoder and VAE are Wan2.1's own.
""",
    "lora, comfyui": """\
Copy `{file}` to ComfyUI's `models/loras/` and put the node LoraLoaderModelOnly, strength 1, behind the base model.
""",
    "lora, kohya": """\
`{file}` has kohya's keys, for musubi-tuner and what was made for it. ComfyUI reads them too, but not the modulation's,
which no key of kohya's stands for; the file with ComfyUI's keys has all.
""",
    "lora, diffusers": """\
```python
from safetensors.torch import load_file

pipeline.load_lora_weights("path/to/this/folder", weight_name="{file}")  # needs peft
parameters = dict(pipeline.transformer.named_parameters())
for key, change in load_file("path/to/this/folder/{rest}").items():  # norms and modulation, which PEFT has no keys for
    parameter = parameters[key.removeprefix("transformer.").removesuffix(".diff")].data
    parameter += change.to(parameter)
```
""",
}
_SAMPLE_DIFFUSERS = """\
{pipeline}The scheduler re-noises each prediction to the next timestep; it must get the student's own noise levels:

```python
import functools
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained("path/to/this/folder", subfolder="scheduler")
scheduler.set_timesteps = functools.partial(scheduler.set_timesteps, sigmas={sigmas})
pipeline = WanPipeline.from_pretrained("{base}", {transformer}scheduler=scheduler)
video = pipeline("a cat walks on grass", num_inference_steps={steps}, guidance_scale=1.0).frames[0]
```
"""
_SAMPLE_COMFYUI = """\
In ComfyUI, in a workflow for Wan2.1 text to video:

| what | value |
| --- | --- |
| guidance | CFG 1 (CFGGuider, or BasicGuider), no negative prompt |
| sampler | `lcm` (KSamplerSelect): it predicts x0 and noises it again, as the student was trained |
| sigmas | `{sigmas}` (ManualSigmas) |
| shift | off: no ModelSamplingSD3 is needed, since the sigmas are shifted already |
"""
_SAMPLE_NATIVE = """\
Sample with a loop of its own, since Wan's solvers are for many steps:

```python
x = {start}torch.randn(16, 21, 60, 104)
for t, t_next in zip({timesteps}, {following}):
    velocity = transformer([x], t=torch.tensor([t]), context=[prompt_embeds], seq_len=32760)[0]
    x0 = x - t / 1000 * velocity
    x = (1 - t_next / 1000) * x0 + t_next / 1000 * torch.randn_like(x0)
```
"""


def model_card(
    config: WanDiTConfig,
    *,
    layout: str,
    student: Mapping | None,
    settings: Mapping | None,
    adapters: Sequence[str] = (),
    file: str = "",
    rest: str = "",
    errors: Mapping[str, float] | None = None,
) -> str:
    """Return the model card, Markdown with the Hub's YAML header.

    Args:
      config: the transformer's sizes, which tell the base model.
      layout: "native", "diffusers" or "comfyui"; or "lora, STYLE".
      student: timesteps, shift, guidance_scale and num_steps it was trained for; None for weights of no student.
      settings: of the training run, or None if they are not known.
      adapters: style adapters that are merged in, with their strengths.
      file, rest: names of the file, where the layout has one, and of what lies beside a LoRA.
      errors: of a LoRA: rank -> what it leaves out of the difference from its base, as a share.
    """
    base = _BASES.get(config)
    size = f"{config.num_layers} layers, width {config.dim}, {config.num_heads} heads"
    header = ["---", "license: apache-2.0", "pipeline_tag: text-to-video"]
    header += [f"base_model: {base}"] if base else []
    header += ["base_model_relation: adapter", "tags: [lora]"] if layout.startswith("lora") else []
    base_name = f"[{base}](https://huggingface.co/{base})" if base else f"a Wan2.1 text-to-video model ({size})"
    what = "LoRA" if layout.startswith("lora") else "transformer" if student is None else "student"
    if student is None:
        title = f"# Wan2.1 {what}"
        about = f"Weights of {base_name}, converted. They are no few-step student: sample with Wan's many-step solvers."
        sample = ""
    else:
        timesteps = [float(t) for t in student["timesteps"]]
        title = f"# {len(timesteps)}-step Wan2.1 {what}"
        about = _about_student(student, timesteps, base_name, settings or {})
        sample = _how_to_sample(layout, timesteps, base)
    load = _LOAD[layout].replace("{file}", file).replace("{rest}", rest).rstrip()
    parts = ["\n".join([*header, "---"]), title, about]
    if adapters:
        parts.append("Merged into it: " + ", ".join(f"`{adapter}`" for adapter in adapters) + " (file:strength).")
    parts += ["## Loading", load, sample.rstrip()]
    if layout.startswith("lora"):
        parts.append("`avd_jax` reads this folder as `--lora`.")
    else:
        parts.append("`avd_jax.convert.load_dit` reads this folder too.")
    if errors:
        rows = ["| rank | left out of the change |", "| --- | --- |"]
        parts += ["## Error", "\n".join(rows + [f"| {rank} | {error:.3f} |" for rank, error in errors.items()])]
    if settings:
        # The checkpoint's own settings are told once, and where on a disk its base lay is nobody's business.
        left_out = {"base", *(["config"] if "settings" in settings else [])}
        told = {name: value for name, value in settings.items() if name not in left_out}
        parts += ["## Training settings", f"```json\n{json.dumps(told, indent=2, sort_keys=True)}\n```"]
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


def _about_student(student: Mapping, timesteps: list[float], base_name: str, settings: Mapping) -> str:
    steps = student.get("num_steps", len(timesteps))
    rows = {
        "method": _PAPERS.get(settings.get("config", {}).get("method"), _PAPERS["avd"]),
        "base model": base_name,
        "steps": f"{steps}, or the first few of them" if student.get("fewer_steps") else steps,
        "timesteps (of 1000; noise level = timestep / 1000)": ", ".join(f"{t:g}" for t in timesteps),
        "timestep shift in training": student.get("shift", "not recorded"),
        "guidance scale in training": student.get("guidance_scale", "not recorded"),
        "guidance when sampling": "none: it is distilled into the weights (guidance scale 1)",
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def _how_to_sample(layout: str, timesteps: list[float], base: str | None) -> str:
    sigmas = [t / 1000 for t in timesteps]
    if layout in ("comfyui", "lora, comfyui", "lora, kohya"):
        return _SAMPLE_COMFYUI.format(sigmas=", ".join(f"{sigma:g}" for sigma in [*sigmas, 0.0]))
    if layout == "native":
        start = f"{sigmas[0]:g} * " if sigmas[0] < 1 else ""
        return _SAMPLE_NATIVE.format(timesteps=timesteps, following=[*timesteps[1:], 0.0], start=start)
    of_lora = layout != "diffusers"
    weaker = f"Its first noise level is {sigmas[0]:g}: pass noise times that as `latents`.\n\n" if sigmas[0] < 1 else ""
    return weaker + _SAMPLE_DIFFUSERS.format(
        pipeline="The pipeline is made so, before the lines above. " if of_lora else "",
        transformer="" if of_lora else "transformer=transformer, ",
        sigmas=sigmas,
        steps=len(timesteps),
        base=f"{base or 'path/to/wan2.1'}-Diffusers",
    )
