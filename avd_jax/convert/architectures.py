"""The networks that can be converted: how each is built, and where its tables and sizes come from."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from avd_jax.convert import dit_rules, interpolator_rules, raft_rules, umt5_rules, vae_rules, vit_rules
from avd_jax.convert.engine import Rule
from avd_jax.convert.state import flat_state
from avd_jax.errors import UserError, closest
from avd_jax.models.interpolator import Interpolator, InterpolatorConfig
from avd_jax.models.raft import RAFT as RAFTModule
from avd_jax.models.raft import RAFTConfig
from avd_jax.models.umt5 import UMT5Config, UMT5Encoder
from avd_jax.models.vit import VisionTransformer, ViTConfig
from avd_jax.models.wan_dit import WanDiT, WanDiTConfig
from avd_jax.models.wan_vae import WanVAE, WanVAEConfig

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One kind of network.

    Attributes:
      name: the name in our own config.json and in training checkpoints.
      component: its folder in diffusers' layout and in ours.
      label: what messages call it.
      config_class: its frozen dataclass of sizes.
      build: `build(config, dtype, **options)` makes the module with random weights, dtype for storage and compute (but
        for leaves that stay float32 since rounding them costs most).
      native_rules: `native_rules(config)` is the table of the original's own keys (Wan's).
      diffusers_rules: `diffusers_rules(config)` is the table of diffusers' or transformers' keys.
      config_from_json: `(entries, name)` reads the config.json that lies beside the weights.
      config_from_shapes: `(native key -> shape, name)` reads the sizes off the weights, if no config.json gives them.
      ignored: prefixes of keys that a file may have and this network does not need.
      aliases: (key, own key): what stands for an own key that a file does not have, in the order of preference.
      zero_at_first: ends of the paths of matrices that are all zero in a model that has not been trained; no other is.
    """

    name: str
    component: str
    label: str
    config_class: type
    build: Callable[..., nnx.Module]
    native_rules: Callable[[Any], list[Rule]]
    diffusers_rules: Callable[[Any], list[Rule]]
    config_from_json: Callable[[dict, str], Any]
    config_from_shapes: Callable[[Shapes, str], Any]
    ignored: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    zero_at_first: tuple[str, ...] = ()

    def abstract(self, config, dtype=jnp.float32, **options) -> nnx.Module:
        """Return the module without arrays."""
        return nnx.merge(*_abstract(self, config, jnp.dtype(dtype), **options))

    def leaves(self, config) -> dict[str, jax.ShapeDtypeStruct]:
        """Return dotted path -> shape of every leaf (as float32)."""
        return dict(_leaves(self, config))

    def record(self, config) -> dict:
        """Return what names this network in our config.json and in a checkpoint's meta data."""
        return {"name": self.name, "config": dataclasses.asdict(config)}

    def config_from_record(self, record: Any, *, name: str):
        """Read `record`'s result back from JSON; `name` is the file's path, for messages.

        Raises:
          UserError: another network, or a field that is unknown, missing or of the wrong type.
        """
        if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
            raise UserError(f"{name}: has no architecture with 'name' and 'config'; convert the weights again")
        if record.get("name") != self.name:
            raise UserError(
                f"{name}: holds the architecture {record.get('name')!r}, not a {self.label} ({self.name!r})"
            )
        fields = {field.name: field.default for field in dataclasses.fields(self.config_class)}
        values = {key: _as_tuple(value) for key, value in record["config"].items()}
        for key in values:
            if key not in fields:
                raise UserError(f"{name}: the architecture's field {key!r} is not known{closest(key, fields)}")
        for key, default in fields.items():
            if key not in values:
                raise UserError(f"{name}: the architecture's field {key!r} is missing")
            if default is not dataclasses.MISSING and type(values[key]) is not type(default):
                raise UserError(
                    f"{name}: the architecture's field {key!r} is {values[key]!r}, expected like {default!r}"
                )
        return self.config_class(**values)


@functools.lru_cache(maxsize=8)  # tracing a constructor takes a second, and loading needs the result several times
def _abstract(architecture: Architecture, config, dtype, **options) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: architecture.build(config, dtype, **options)))


@functools.lru_cache(maxsize=8)
def _leaves(architecture: Architecture, config) -> dict[str, jax.ShapeDtypeStruct]:
    _, state = _abstract(architecture, config, jnp.dtype(jnp.float32))
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flat_state(state).items()}


def _as_tuple(value):
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value


def layer_of(rules: Sequence[Rule], key: str) -> tuple[int, str] | None:
    """Return which rule matches `key` and the layer in it, or None."""
    for i, rule in enumerate(rules):
        if (layer := rule.match(key)) is not None:
            return i, layer
    return None


_DIT_COUNTS = (
    *("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "freq_dim", "text_dim", "text_len"),
    *("num_attention_heads", "attention_head_dim", "in_channels", "out_channels"),
)


def _dit_from_json(entries: dict, name: str) -> WanDiTConfig:
    for field in _DIT_COUNTS:
        if field in entries and (type(entries[field]) is not int or entries[field] < 1):
            raise UserError(f"{name}: the field {field!r} is {entries[field]!r}, expected a positive whole number")
    patch = entries.get("patch_size", [1, 2, 2])
    if not isinstance(patch, list) or len(patch) != 3 or not all(type(size) is int and size > 0 for size in patch):
        raise UserError(f"{name}: the field 'patch_size' is {patch!r}, expected three positive whole numbers")
    if "num_attention_heads" in entries or entries.get("_class_name") == "WanTransformer3DModel":
        return dit_rules.config_from_diffusers(entries, name=name)
    return dit_rules.config_from_native(entries, name=name)


def _dit_from_shapes(shapes: Shapes, name: str) -> WanDiTConfig:
    dim = shapes.get("patch_embedding.weight", (0,))[0]
    if dim % 64:  # the width of a head leaves no trace in the shapes, and no Wan model has a narrower one
        raise UserError(
            f"{name}: the number of heads cannot be told for a width of {dim}; put its config.json beside it"
        )
    return dit_rules.config_from_shapes(dict(shapes), name=name)


def _build_dit(config: WanDiTConfig, dtype, **options) -> WanDiT:
    return WanDiT(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype, **options)


def _build_vae(config: WanVAEConfig, dtype) -> WanVAE:
    return WanVAE(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)


def _build_interpolator(config: InterpolatorConfig, dtype) -> Interpolator:
    return Interpolator(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)


def _build_umt5(config: UMT5Config, dtype) -> UMT5Encoder:
    return UMT5Encoder(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)


def _build_vit(config: ViTConfig, dtype) -> VisionTransformer:
    return VisionTransformer(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)


def _build_raft(config: RAFTConfig, dtype) -> RAFTModule:
    return RAFTModule(config, rngs=nnx.Rngs(0), param_dtype=dtype)


WAN_DIT = Architecture(
    name="wan_dit",
    component="transformer",
    label="diffusion transformer",
    config_class=WanDiTConfig,
    build=_build_dit,
    native_rules=dit_rules.native_rules,
    diffusers_rules=dit_rules.diffusers_rules,
    config_from_json=_dit_from_json,
    config_from_shapes=_dit_from_shapes,
    ignored=interpolator_rules.PREFIXES,  # AVD has its frame interpolator inside the generator
    zero_at_first=("head.head.kernel",),  # Wan's own code starts so
)
WAN_VAE = Architecture(
    name="wan_vae",
    component="vae",
    label="video autoencoder",
    config_class=WanVAEConfig,
    build=_build_vae,
    native_rules=vae_rules.native_rules,
    diffusers_rules=vae_rules.diffusers_rules,
    config_from_json=lambda entries, name: vae_rules.config_from_diffusers(entries, name=name),
    config_from_shapes=lambda shapes, name: vae_rules.config_from_native(shapes, name=name),
    zero_at_first=("conv2.kernel", "proj.kernel"),  # residual branches; Wan's own code and methods/vae start so
)
UMT5 = Architecture(
    name="umt5",
    component="text_encoder",
    label="umT5 text encoder",
    config_class=UMT5Config,
    build=_build_umt5,
    native_rules=umt5_rules.native_rules,
    diffusers_rules=umt5_rules.diffusers_rules,
    config_from_json=lambda entries, name: umt5_rules.config_from_diffusers(entries),
    config_from_shapes=lambda shapes, name: umt5_rules.config_from_native(shapes),
    ignored=umt5_rules.DECODER,
    aliases=umt5_rules.TIED,
)
INTERPOLATOR = Architecture(
    name="interpolator",
    component="interpolator",
    label="frame interpolator",
    config_class=InterpolatorConfig,
    build=_build_interpolator,
    native_rules=interpolator_rules.rules,
    diffusers_rules=interpolator_rules.rules,
    config_from_json=lambda entries, name: interpolator_rules.config_from_json(entries, name=name),
    config_from_shapes=lambda shapes, name: interpolator_rules.config_from_shapes(shapes, name=name),
    zero_at_first=("out_conv.kernel",),
)
ARCHITECTURES = (WAN_DIT, WAN_VAE, UMT5, INTERPOLATOR)  # the parts of a video model

CLIP_VIT = Architecture(
    name="clip_vit",
    component="clip",
    label="CLIP",
    config_class=ViTConfig,
    build=_build_vit,
    native_rules=vit_rules.clip_native_rules,
    diffusers_rules=vit_rules.clip_huggingface_rules,
    config_from_json=lambda entries, name: vit_rules.clip_config_from_json(entries, name=name),
    config_from_shapes=lambda shapes, name: vit_rules.config_from_shapes(shapes, name=name),
    ignored=vit_rules.TEXT_TOWER,
)
DINO_VIT = Architecture(
    name="dino_vit",
    component="dino",
    label="DINO",
    config_class=ViTConfig,
    build=_build_vit,
    native_rules=vit_rules.dino_native_rules,
    diffusers_rules=vit_rules.dino_huggingface_rules,
    config_from_json=lambda entries, name: vit_rules.dino_config_from_json(entries, name=name),
    config_from_shapes=lambda shapes, name: vit_rules.config_from_shapes(shapes, name=name),
)
RAFT = Architecture(
    name="raft",
    component="raft",
    label="RAFT",
    config_class=RAFTConfig,
    build=_build_raft,
    native_rules=raft_rules.rules,
    diffusers_rules=raft_rules.rules,
    config_from_json=lambda entries, name: RAFTConfig(**entries),  # nobody writes one
    config_from_shapes=lambda shapes, name: raft_rules.config_from_shapes(shapes, name=name),
)
VISION = (CLIP_VIT, DINO_VIT)  # vectors of pictures
SCORING = (*VISION, RAFT)  # score videos


def in_native_names(architecture: Architecture, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Return `shapes` under Wan's own keys, if they are under diffusers' (both tables are in the same order)."""
    native = architecture.native_rules(architecture.config_class())
    diffusers = architecture.diffusers_rules(architecture.config_class())
    renamed = {}
    for key, shape in shapes.items():
        found = layer_of(diffusers, key)
        renamed[native[found[0]].source.replace("{}", found[1]) if found and found[0] < len(native) else key] = shape
    return renamed


def matching_keys(rules: Sequence[Rule], keys) -> int:
    """Return how many of `keys` the table knows."""
    patterns = re.compile("|".join(re.escape(rule.source).replace(r"\{\}", r"\d+") for rule in rules))
    return sum(patterns.fullmatch(key) is not None for key in keys)
