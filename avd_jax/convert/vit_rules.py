"""Conversion tables of the vision transformers: CLIP's image tower and DINO, each under two sets of keys.

Sources: OpenAI's `ViT-L-14.pt` and `ViT-B-32.pt` (keys of CLIP's `clip/model.py`) and transformers' `CLIPModel`;
Meta's `dino_vitbase16_pretrain.pth` (keys of DINO's `vision_transformer.py`) and transformers' `ViTModel`.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from avd_jax.convert.engine import Rule
from avd_jax.errors import UserError
from avd_jax.models.vit import ACTIVATIONS, ViTConfig

_SAME, _LINEAR, _PATCH = "... -> ...", "o i -> i o", "d i p q -> p q i d"
_HEAD_DIM = 64  # of every published model; it leaves no trace in the shapes

Row = tuple[str, str, str, str]  # our path, the original's key, transformers' key, layout


def _norm(ours: str, original: str, huggingface: str) -> list[Row]:
    ends = (("scale", "weight"), ("bias", "bias"))
    return [(f"{ours}.{leaf}", f"{original}.{end}", f"{huggingface}.{end}", _SAME) for leaf, end in ends]


def _linear(ours: str, original: str, huggingface: str) -> list[Row]:
    ends = (("kernel", "weight", _LINEAR), ("bias", "bias", _SAME))
    return [(f"{ours}.{leaf}", f"{original}.{end}", f"{huggingface}.{end}", layout) for leaf, end, layout in ends]


_VISION, _OPENAI_LAYER, _CLIP_LAYER = (
    "vision_model",
    "visual.transformer.resblocks.{}",
    "vision_model.encoder.layers.{}",
)
_CLIP: tuple[Row, ...] = (
    ("class_embedding", "visual.class_embedding", f"{_VISION}.embeddings.class_embedding", _SAME),
    ("positions", "visual.positional_embedding", f"{_VISION}.embeddings.position_embedding.weight", _SAME),
    ("patch.kernel", "visual.conv1.weight", f"{_VISION}.embeddings.patch_embedding.weight", _PATCH),
    *_norm("pre_norm", "visual.ln_pre", f"{_VISION}.pre_layrnorm"),
    *_norm("norm", "visual.ln_post", f"{_VISION}.post_layernorm"),
    *_norm("blocks.norm1", f"{_OPENAI_LAYER}.ln_1", f"{_CLIP_LAYER}.layer_norm1"),
    *_norm("blocks.norm2", f"{_OPENAI_LAYER}.ln_2", f"{_CLIP_LAYER}.layer_norm2"),
    *_linear("blocks.attn.o", f"{_OPENAI_LAYER}.attn.out_proj", f"{_CLIP_LAYER}.self_attn.out_proj"),
    *_linear("blocks.mlp.fc1", f"{_OPENAI_LAYER}.mlp.c_fc", f"{_CLIP_LAYER}.mlp.fc1"),
    *_linear("blocks.mlp.fc2", f"{_OPENAI_LAYER}.mlp.c_proj", f"{_CLIP_LAYER}.mlp.fc2"),
)
_LAYER = "encoder.layer.{}"
_DINO: tuple[Row, ...] = (
    ("class_embedding", "cls_token", "embeddings.cls_token", "1 1 d -> d"),
    ("positions", "pos_embed", "embeddings.position_embeddings", "1 n d -> n d"),
    ("patch.kernel", "patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight", _PATCH),
    ("patch.bias", "patch_embed.proj.bias", "embeddings.patch_embeddings.projection.bias", _SAME),
    *_norm("norm", "norm", "layernorm"),
    *_norm("blocks.norm1", "blocks.{}.norm1", f"{_LAYER}.layernorm_before"),
    *_norm("blocks.norm2", "blocks.{}.norm2", f"{_LAYER}.layernorm_after"),
    *_linear("blocks.attn.o", "blocks.{}.attn.proj", f"{_LAYER}.attention.output.dense"),
    *_linear("blocks.mlp.fc1", "blocks.{}.mlp.fc1", f"{_LAYER}.intermediate.dense"),
    *_linear("blocks.mlp.fc2", "blocks.{}.mlp.fc2", f"{_LAYER}.output.dense"),
)

# Keys that come with a CLIP: its text tower, and numbers about it (transformers' file and OpenAI's).
TEXT_TOWER = (
    *("text_model.", "text_projection", "logit_scale", "vision_model.embeddings.position_ids"),
    *("transformer.", "token_embedding.", "positional_embedding", "ln_final."),
    *("input_resolution", "context_length", "vocab_size"),
)
# Keys by which other models of the kind are told: their other keys are often the same.
_OTHERS = (
    (r"(^|\.)(ls1\.|layer_scale1|mask_token|register_tokens)", "a DINOv2"),
    (r"vision_model\.head\.|logit_bias", "a SigLIP"),
    (r"visual\.(attnpool|layer1)\.", "a CLIP with a ResNet"),
    (r"visual\.trunk\.", "an open_clip model with another image tower than a ViT"),
    (r"(^|\.)(pooler\.dense|classifier)\.", "a ViT trained to name classes (facebook/dino-vitb16 has no such layer)"),
)


def clip_native_rules(config: ViTConfig) -> list[Rule]:
    """Return the table for the keys of OpenAI's own files."""
    fused = _fused(f"{_OPENAI_LAYER}.attn.in_proj_weight", f"{_OPENAI_LAYER}.attn.in_proj_bias", config)
    return [*_rules(_CLIP, 1), Rule("visual.proj", "projection"), *fused]


def clip_huggingface_rules(config: ViTConfig) -> list[Rule]:
    """Return the table for the keys of transformers' CLIPModel and CLIPVisionModelWithProjection."""
    keys = (f"{_CLIP_LAYER}.self_attn.{name}_proj" for name in "qkv")
    return [*_rules(_CLIP, 2), Rule("visual_projection.weight", "projection", _LINEAR), *_apart(keys, config)]


def dino_native_rules(config: ViTConfig) -> list[Rule]:
    """Return the table for the keys of Meta's own file."""
    return [*_rules(_DINO, 1), *_fused("blocks.{}.attn.qkv.weight", "blocks.{}.attn.qkv.bias", config)]


def dino_huggingface_rules(config: ViTConfig) -> list[Rule]:
    """Return the table for the keys of transformers' ViTModel."""
    keys = (f"{_LAYER}.attention.attention.{name}" for name in ("query", "key", "value"))
    return [*_rules(_DINO, 2), *_apart(keys, config)]


def _rules(rows: Iterable[Row], column: int) -> list[Rule]:
    return [Rule(row[column], row[0], row[3]) for row in rows]


def _fused(weight: str, bias: str, config: ViTConfig) -> list[Rule]:
    sizes = {"s": 3, "h": config.num_heads}
    return [
        Rule(weight, "blocks.attn.qkv.kernel", "(s h k) d -> s d h k", sizes),
        Rule(bias, "blocks.attn.qkv.bias", "(s h k) -> s h k", sizes),
    ]


def _apart(keys: Iterable[str], config: ViTConfig) -> list[Rule]:
    leaves = (("weight", "kernel", "(h k) d -> d h k"), ("bias", "bias", "(h k) -> h k"))
    return [
        Rule(f"{key}.{end}", f"blocks.attn.qkv.{leaf}", layout, {"h": config.num_heads}, part)
        for part, key in enumerate(keys)
        for end, leaf, layout in leaves
    ]


def what_else(keys: Iterable[str]) -> str | None:
    """Return what a vision transformer with these keys is, if it is one of another kind than CLIP's and DINO's."""
    keys = list(keys)
    return next((what for pattern, what in _OTHERS if any(re.search(pattern, key) for key in keys)), None)


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], *, name: str) -> ViTConfig:
    """Return the sizes of a file with the originals' keys; nothing in it tells the activation, so it is theirs.

    Args:
      shapes: key -> shape of the file's tensors; transformers' under the originals' keys, with their own layouts.
      name: what the messages call the file.

    Raises:
      UserError: when a key that the sizes are read from is missing or has another rank.
    """
    clip = "visual.conv1.weight" in shapes
    keys = {ours: original for ours, original, _, _ in (_CLIP if clip else _DINO)}

    def shape(ours: str, rank: int) -> tuple[int, ...]:
        found = tuple(shapes.get(keys[ours], ()))
        if len(found) != rank:
            raise UserError(f"{name}: no {keys[ours]!r} in it, or not as CLIP and DINO have it; it is incomplete")
        return found

    dim, _, patch_size, _ = shape("patch.kernel", 4)
    grid = math.isqrt(shape("positions", 2 if clip else 3)[-2] - 1)
    if dim % _HEAD_DIM:
        raise UserError(
            f"{name}: the number of heads cannot be told for a width of {dim}; put its config.json beside it"
        )
    layer = re.escape(keys["blocks.norm1.scale"]).replace(r"\{\}", r"(\d+)")
    layers = {found[1] for key in shapes if (found := re.fullmatch(layer, key))}
    keys["first layer's fc1"] = keys["blocks.mlp.fc1.kernel"].replace("{}", "0")
    projection = tuple(shapes.get("visual.proj", ()))
    return ViTConfig(
        image_size=grid * patch_size,
        patch_size=patch_size,
        dim=dim,
        num_layers=len(layers),
        num_heads=dim // _HEAD_DIM,
        mlp_dim=shape("first layer's fc1", 2)[0],
        # OpenAI's matrix is [dim projection], transformers' is its transpose.
        projection_dim=(projection[1] if projection[0] == dim else projection[0]) if len(projection) == 2 else 0,
        clip=clip,
        activation="quick_gelu" if clip else "gelu",
        eps=1e-5 if clip else 1e-6,
    )


# ViTConfig field -> field of transformers' config.json, which leaves out what is as in its own defaults.
_FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "activation": "hidden_act",
    "eps": "layer_norm_eps",
}
_COMMON = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_CLIP_DEFAULTS = {"image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, **_COMMON}
_DINO_DEFAULTS = {"image_size": 224, "patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-12, **_COMMON}


def clip_config_from_json(entries: Mapping[str, Any], *, name: str) -> ViTConfig:
    """Return the sizes in the config.json of a CLIPModel or of its vision model; UserError for another model's."""
    vision = entries
    if entries.get("model_type") == "clip":
        vision = entries.get("vision_config") or {}
        if not isinstance(vision, Mapping):
            raise UserError(f"{name}: the field 'vision_config' is {vision!r}, expected an object")
    elif entries.get("model_type") != "clip_vision_model":
        raise UserError(f"{name}: model_type is {entries.get('model_type')!r}, expected 'clip'")
    projection = {"projection_dim": entries.get("projection_dim", 512)}
    return _config_from_json({**_CLIP_DEFAULTS, **vision, **projection}, clip=True, name=name)


def dino_config_from_json(entries: Mapping[str, Any], *, name: str) -> ViTConfig:
    """Return the sizes in the config.json of a ViTModel; UserError for another model's."""
    if entries.get("model_type") != "vit":
        raise UserError(f"{name}: model_type is {entries.get('model_type')!r}, expected 'vit'")
    return _config_from_json({**_DINO_DEFAULTS, **entries}, clip=False, name=name)


def _config_from_json(entries: Mapping[str, Any], *, clip: bool, name: str) -> ViTConfig:
    fields = _FIELDS | ({"projection_dim": "projection_dim"} if clip else {})
    for field, theirs in fields.items():
        value = entries[theirs]
        if field == "activation":
            if value not in ACTIVATIONS:
                raise UserError(f"{name}: the field {theirs!r} is {value!r}, known are {', '.join(ACTIVATIONS)}")
        elif type(value) not in ((int, float) if field == "eps" else (int,)) or value <= 0:
            raise UserError(f"{name}: the field {theirs!r} is {value!r}, expected a positive number")
    sizes = {field: entries[theirs] for field, theirs in fields.items()}
    return ViTConfig(**{"projection_dim": 0, **sizes}, clip=clip)
