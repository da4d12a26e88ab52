"""The fields that the methods share which distil a Wan transformer into a few-step student."""

from avd_jax.fields import Field, Fields, all_local, at_least, band, finite, not_negative, one_of, positive, weights
from avd_jax.methods.adapters import ADAPTER_FIELDS
from avd_jax.methods.transformers import ATTENTION_FIELDS, DTYPES, LORA_FIELDS, REMAT, WHICH_FIELDS, sets
from avd_jax.models.vae_tiles import MEMORY_GIB
from avd_jax.models.wan_dit import REMAT_POLICIES, WAN_MODELS
from avd_jax.parallel.memory import MEMORIES
from avd_jax.training.config import ACCUMULATION_FIELDS, MESH_FIELDS

DISTILLATION_FIELDS: Fields = {
    "num_steps": Field(1000, "generator updates in the run", at_least(1), changeable=True),
    **ACCUMULATION_FIELDS,
    "init_from": Field(
        "",
        "weights of the teacher, which all networks start from, in any layout; sets the sizes",
        weights,
        changeable=True,
    ),
    **WHICH_FIELDS,
    **LORA_FIELDS,
    "model": Field("", f"what aot_compile.py compiles if init_from is empty: {', '.join(WAN_MODELS)}"),
    "data.latents": Field(
        "",
        "folder of encoded videos (scripts/encode.py --videos), for the regression or consistency loss; or several, as "
        "in a:3,b:1",
        sets,
        changeable=True,
    ),
    "data.prompts": Field(
        "",
        "folder of encoded prompts (scripts/encode.py --prompts), or several; empty: the captions of data.latents",
        sets,
        changeable=True,
    ),
    "data.held_out": Field(
        "",
        "lists of prompts that the student will be judged by, separated by commas: a run begins with a line for each "
        "of them that training texts are like; with captions for prompts it reads all of data.latents for that",
        all_local,
        changeable=True,
    ),
    "score.shift": Field(
        5.0, "timestep shift of the random timesteps at which teacher and fake_score are compared", positive
    ),
    "guidance_scale": Field(
        5.0, "guidance of the teacher, in Wan's convention uncond + scale * (cond - uncond)", finite
    ),
    "compute_dtype": Field("bfloat16", "dtype of matrix products; masters and moments are float32", DTYPES),
    "teacher_dtype": Field("bfloat16", "dtype in which the frozen teacher is stored and run", DTYPES),
    "teacher_memory": Field(
        "device",
        "where the teacher's layers wait: 'device', or 'host', which sends one at a time",
        one_of(MEMORIES),
        changeable=True,
    ),
    "optimizer.memory": Field(
        "device",
        "where AdamW's moments wait between two updates: 'device', or 'host', which sends them for the update",
        one_of(MEMORIES),
        changeable=True,
    ),
    "remat": Field(
        "block", "what the backward pass keeps of a block: " + ", ".join(REMAT_POLICIES), REMAT, changeable=True
    ),
    **ADAPTER_FIELDS,
    **MESH_FIELDS,
    **ATTENTION_FIELDS,
    "meters.temporal_variance": Field(
        (0.5, 2.0), "band of the student's variance along frames, as a share of real videos'", band, changeable=True
    ),
    "meters.saturation": Field(
        (0.7, 1.4),
        "band of its mean HSV saturation; a meter that leaves its band is a warning line",
        band,
        changeable=True,
    ),
    "meters.colourfulness": Field(
        (0.7, 1.4), "band of its colourfulness (Hasler and Suesstrunk)", band, changeable=True
    ),
    "meters.latent_temporal_variance": Field(
        (0.4, 2.0), "band of the variance of its latents along frames", band, changeable=True
    ),
    "meters.latent_spread": Field(
        (0.7, 1.4), "band of the deviation of its latents over height and width", band, changeable=True
    ),
    "sample_every": Field(
        100,
        "generator updates between two sets of sample videos, the last update has one too; 0: never",
        not_negative,
        changeable=True,
    ),
    "sample.prompts": Field(
        4,
        "prompts to sample: the first ones of data.prompts",
        at_least(1, "; sample_every=0 samples nothing"),
        changeable=True,
    ),
    "sample.vae": Field(
        "", "weights of the VAE that decodes the samples; empty: those beside init_from", weights, changeable=True
    ),
    "sample.vae_gib": Field(
        MEMORY_GIB,
        "GiB of a device that decoding one may take, in as many tiles as that needs",
        positive,
        changeable=True,
    ),
    "sample.teacher_steps": Field(
        50, "UniPC steps of the teacher's videos that stand beside them; 0: no teacher", not_negative, changeable=True
    ),
    "sample.teacher_shift": Field(5.0, "timestep shift of the teacher's solver", positive, changeable=True),
}
