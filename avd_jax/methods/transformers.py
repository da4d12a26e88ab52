"""What the methods that run Wan's transformer share: its fields, its placement, its weights, and data that fit it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from avd_jax import convert
from avd_jax.convert.adapted import with_adapters
from avd_jax.convert.adapters import named_adapters
from avd_jax.convert.architectures import WAN_DIT
from avd_jax.convert.fingerprint import fingerprint
from avd_jax.convert.networks import DEFAULT
from avd_jax.convert.weights import open_weights
from avd_jax.data import mixture
from avd_jax.data.latents import LatentsInfo, read_negative_prompt_embeds
from avd_jax.data.pipeline import training_batches
from avd_jax.errors import UserError
from avd_jax.fields import Field, Fields, one_of, refusal
from avd_jax.generation.pipeline import LatentsShape, latents_shape
from avd_jax.models.functional import Params
from avd_jax.models.placement import AttentionBlocks, Placement
from avd_jax.models.wan_dit import REMAT_POLICIES, WanDiTConfig
from avd_jax.models.wan_vae import WanVAEConfig
from avd_jax.parallel.hosts import batch_rows
from avd_jax.parallel.memory import parameter_sharding
from avd_jax.parallel.mesh import BATCH_AXES, batch_shards, make_mesh, replicated
from avd_jax.parallel.rules import dotted
from avd_jax.training.method import BatchField, Frozen

WHICH_FIELDS: Fields = {
    "which": Field(
        "", "network of init_from, where there are several: ema of a run, or its name in a file", changeable=True
    ),
}
LORA_FIELDS: Fields = {
    "init_lora": Field(
        "",
        "style LoRAs merged into init_from, FILE[:STRENGTH] separated by commas (docs/adapters.md)",
        lambda value: refusal(value, named_adapters),
        changeable=True,
    ),
}
DTYPES = one_of(("float32", "bfloat16"))
REMAT = one_of(REMAT_POLICIES)
ATTENTION_FIELDS: Fields = {
    "attention.kernel": Field(
        "auto",
        "'auto' chooses by device: 'pipelined' or 'splash' on TPU, 'cudnn' on CUDA, 'xla' elsewhere",
        changeable=True,
    ),
    "attention.pipelined_blocks": Field(
        (1024, 1024), "pipelined: queries, and keys at a time (tune_attention.py)", changeable=True
    ),
    "attention.forward_blocks": Field(
        (1024, 2048, 512), "splash: queries, keys, and keys at a time (tune_attention.py)", changeable=True
    ),
    "attention.backward_blocks": Field((1024, 2048, 512), "pipelined and splash, backward: likewise", changeable=True),
    "attention.fused_backward": Field(
        True, "pipelined and splash: one backward kernel, which needs more memory, instead of two", changeable=True
    ),
}


def make_placement(attention, mesh: Mesh) -> Placement:
    """Return how a transformer runs on a mesh.

    Args:
      attention: the config's `attention`.
      mesh: of the devices.

    Raises:
      UserError: naming the field of `config.attention` that is wrong.
    """
    blocks = AttentionBlocks(
        forward=attention.forward_blocks,
        pipelined=attention.pipelined_blocks,
        backward=attention.backward_blocks,
        fused_backward=attention.fused_backward,
    )
    return Placement(attention.kernel, mesh=mesh, batch_axes=BATCH_AXES, sequence_axis="seq", blocks=blocks)


def batch_mesh(sizes: Mapping[str, int], batch_size: int, devices=None) -> Mesh:
    """Return the mesh of `config.mesh`; raises a UserError if it does not divide the batch."""
    mesh = make_mesh(**sizes, devices=devices)
    if batch_size % batch_shards(mesh):
        raise UserError(f"config.batch_size={batch_size} must be a multiple of {batch_shards(mesh)} shards")
    return mesh


def load_params(config, dtype: str, mesh: Mesh, memory: str = "device") -> Params:
    """Read the parameters of the transformer that a config names, with its adapters, into their shards.

    Args:
      config: has init_from, which and init_lora.
      dtype: of the parameters.
      mesh: of the devices.
      memory: where its layers wait.
    """
    sharding = partial(parameter_sharding, mesh=mesh, memory=memory)
    named = {"key": config.which or DEFAULT, "lora": config.init_lora}
    dit = convert.load_dit(config.init_from, jnp.dtype(dtype), **named, sharding=sharding)
    return nnx.to_pure_dict(nnx.state(dit))


def shaped_params(abstract: Params, mesh: Mesh, memory: str = "device") -> Params:
    """Return shapes and dtypes of a transformer's parameters with the shardings that `load_params` gives them."""

    def shaped(keys, leaf):
        sharding = parameter_sharding(dotted(keys), leaf.shape, mesh, memory=memory)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(shaped, abstract)


def weights_fingerprints(config) -> dict[str, str]:
    """Return config field -> what identifies what `load_params` reads of it: the weights, and the adapters if any."""
    weights = open_weights(config.init_from, WAN_DIT, config.which or DEFAULT)
    found = {"init_from": fingerprint(weights)}
    if named_adapters(config.init_lora):
        adapters = with_adapters(weights, config.init_lora).adapters
        found["init_lora"] = " ".join(adapter.fingerprint for adapter in adapters)
    return found


def architecture(model: WanDiTConfig) -> dict:
    """Return a transformer's name and sizes, as checkpoints record them."""
    return {"name": WAN_DIT.name, "config": dataclasses.asdict(model)}


def sets(value: str) -> str | None:
    """Check a field that names encoded sets, or none, as `data/mixture.py` reads them."""
    return refusal(value, mixture.named_sets)


def latents_infos(named: str) -> list[LatentsInfo]:
    """Return what each named set of latents says of itself; raises a UserError if they do not go together."""
    try:
        return mixture.read_infos(named, "latents")
    except UserError as error:
        raise UserError(f"config.data.latents: {error}") from error


def clip_shapes(named: str, video: Mapping[str, int] | None, model: WanDiTConfig) -> list[LatentsShape]:
    """Return the different shapes (F, H, W, C) of the sets' clips, or that of videos of a size if no set is named.

    The first one is that of the first set, in whose size a run shows its samples.
    """
    if named or video is None:
        return list(dict.fromkeys(info.latents_shape for info in latents_infos(named)))
    return [latents_shape(**video, dit=model, vae=WanVAEConfig())]


def set_fingerprints(latents: str, prompts: str = "") -> dict[str, str]:
    """Return config field -> what identifies the sets that it names."""
    found = {"data.latents": mixture.fingerprint(latents)}
    return found | ({"data.prompts": mixture.fingerprint(prompts)} if prompts else {})


def encoded_sizes(batch_size: int, shapes: Sequence[LatentsShape], model: WanDiTConfig) -> dict[str, Mapping]:
    """Return `fields` and `sizes` of a `Method` for encoded sets with clips of these shapes."""
    sizes = {"x".join(map(str, shape[:-1])): encoded_fields(batch_size, shape, model) for shape in shapes}
    return {"fields": encoded_fields(batch_size, shapes[0], model), "sizes": sizes}


def encoded_fields(batch_size: int, latents_shape: tuple[int, ...], model: WanDiTConfig) -> dict[str, BatchField]:
    """Return the fields of batches from encoded sets: `prompts`, fresh for each update, `latents`, their `captions`.

    `canvas` holds no values: its shape says how large the student's samples are that go with these clips.
    """

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, *shape), jnp.bfloat16)

    conditions = {"prompt_embeds": array(model.text_len, model.text_dim)}
    return {
        "prompts": BatchField(conditions, fresh=True),
        "latents": BatchField(array(*latents_shape)),
        "canvas": BatchField(array(0, *latents_shape)),
        "captions": BatchField(conditions),
    }


def encoded_batches(
    config, mesh: Mesh, *, text_len: int, prompts: str = "", held_out: int = 0
) -> Callable[[Mapping[str, int]], object]:
    """Return what `Method.batches` is for encoded sets.

    Args:
      config: has batch_size, seed and data.latents.
      mesh: decides which rows this host reads.
      text_len: tokens of a prompt that the model sees.
      prompts: sets of prompts; empty: the captions of the latents.
      held_out: clips that no update sees.
    """

    def batches(fresh: Mapping[str, int]):
        return training_batches(
            config.data.latents,
            prompts or None,
            batch_size=config.batch_size,
            prompt_batches=fresh.get("prompts", 0),
            seed=config.seed,
            text_len=text_len,
            rows=batch_rows(mesh, config.batch_size).rows,
            held_out=held_out,
        )

    return batches


def abstract_conditions(size: int, model: WanDiTConfig, dtype: str, sharding) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of what a transformer is told of the text, [size text_len text_dim]."""
    shape = size, model.text_len, model.text_dim
    return {"prompt_embeds": jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)}


def negative_conditions(named: str, model: WanDiTConfig, mesh: Mesh) -> Frozen:
    """Return the conditions that guidance subtracts, one for all examples: those of the first set's negative prompt."""
    everywhere = replicated(mesh)
    shape = jax.ShapeDtypeStruct((model.text_len, model.text_dim), jnp.bfloat16, sharding=everywhere)

    def load():
        embeds = read_negative_prompt_embeds(mixture.named_sets(named)[0].path, model.text_len)
        return jax.device_put(as_conditions(jnp.asarray(embeds)), everywhere)

    return Frozen(as_conditions(shape), load)


def as_conditions(prompt_embeds: np.ndarray | jax.Array) -> dict:
    """Return the conditions of Wan's transformer: the text's embeddings [B L D], or [L D] for all."""
    return {"prompt_embeds": prompt_embeds}
