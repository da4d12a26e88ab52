"""Conversion tables of the umT5 text encoder: Wan's own keys and transformers' keys, and their configs.

Sources: `models_t5_umt5-xxl-enc-bf16.pth` of Wan2.1 (keys of `wan/modules/t5.py`), and `text_encoder/` of its
diffusers folder (keys of transformers' `UMT5EncoderModel`).
"""

import re
from collections.abc import Mapping
from typing import Any

from avd_jax.convert.engine import Rule
from avd_jax.errors import UserError
from avd_jax.models.umt5 import UMT5Config

_LINEAR = "o i -> i o"
_SAME = "... -> ..."

# Flax path -> (Wan's key, transformers' key, layout); both layouts of a file differ in their names only.
_KEYS = {
    "token_embedding.embedding": ("token_embedding.weight", "shared.weight", _SAME),
    "norm.scale": ("norm.weight", "encoder.final_layer_norm.weight", _SAME),
    **{
        f"blocks.{flax}": (f"blocks.{{}}.{native}.weight", f"encoder.block.{{}}.layer.{diffusers}.weight", layout)
        for flax, native, diffusers, layout in (
            ("norm1.scale", "norm1", "0.layer_norm", _SAME),
            ("attn.q.kernel", "attn.q", "0.SelfAttention.q", "(h k) d -> d h k"),
            ("attn.k.kernel", "attn.k", "0.SelfAttention.k", "(h k) d -> d h k"),
            ("attn.v.kernel", "attn.v", "0.SelfAttention.v", "(h k) d -> d h k"),
            ("attn.o.kernel", "attn.o", "0.SelfAttention.o", "d (h k) -> h k d"),
            ("pos_embedding.embedding", "pos_embedding.embedding", "0.SelfAttention.relative_attention_bias", _SAME),
            ("norm2.scale", "norm2", "1.layer_norm", _SAME),
            ("ffn.gate.kernel", "ffn.gate.0", "1.DenseReluDense.wi_0", _LINEAR),
            ("ffn.fc1.kernel", "ffn.fc1", "1.DenseReluDense.wi_1", _LINEAR),
            ("ffn.fc2.kernel", "ffn.fc2", "1.DenseReluDense.wo", _LINEAR),
        )
    },
}

# The token embedding is tied: a file may hold it under any of these, in the place of `shared.weight`.
TIED = (("encoder.embed_tokens.weight", "shared.weight"), ("decoder.embed_tokens.weight", "shared.weight"))
# Keys of the whole T5 that its encoder does without.
DECODER = ("decoder.", "lm_head.")

# UMT5Config field -> field of transformers' config.json.
_CONFIG_FIELDS = {
    "vocab_size": "vocab_size",
    "dim": "d_model",
    "ffn_dim": "d_ff",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "num_layers": "num_layers",
    "num_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "eps": "layer_norm_epsilon",
}


def native_rules(config: UMT5Config) -> list[Rule]:
    """Return the table for the keys of Wan's own .pth."""
    return [_rule(native, flax, layout, config) for flax, (native, _, layout) in _KEYS.items()]


def diffusers_rules(config: UMT5Config) -> list[Rule]:
    """Return the table for the keys of transformers' UMT5EncoderModel, in a diffusers folder's `text_encoder/`."""
    rules = [_rule(diffusers, flax, layout, config) for flax, (_, diffusers, layout) in _KEYS.items()]
    # Some files hold the tied token embedding a second time.
    return [*rules, Rule("encoder.embed_tokens.weight", None)]


def _rule(source: str, target: str, layout: str, config: UMT5Config) -> Rule:
    return Rule(source, target, layout, {"h": config.num_heads} if "(h k)" in layout else {})


def config_from_native(
    shapes: Mapping[str, tuple[int, ...]], *, name: str = "models_t5_umt5-xxl-enc-bf16.pth"
) -> UMT5Config:
    """Return the sizes of Wan's .pth, which has no config beside it.

    Args:
      shapes: key -> shape of the file's tensors.
      name: what the messages call the file, usually its path.

    Raises:
      UserError: when a key that the sizes are read from is missing, so the file is no umT5 encoder.
    """

    def shape(key: str) -> tuple[int, ...]:
        if len(shapes.get(key, ())) != 2:
            raise UserError(f"{name}: no matrix {key!r} in it; it is not a umT5 text encoder with Wan's keys")
        return tuple(shapes[key])

    vocab_size, dim = shape("token_embedding.weight")
    num_buckets, num_heads = shape("blocks.0.pos_embedding.embedding.weight")
    layers = {int(found.group(1)) for key in shapes if (found := re.match(r"blocks\.(\d+)\.", key))}
    return UMT5Config(
        vocab_size=vocab_size,
        dim=dim,
        ffn_dim=shape("blocks.0.ffn.fc1.weight")[0],
        num_heads=num_heads,
        head_dim=shape("blocks.0.attn.q.weight")[0] // num_heads,
        num_layers=len(layers),
        num_buckets=num_buckets,
    )


def config_from_diffusers(config_json: Mapping[str, Any], *, name: str = "config.json") -> UMT5Config:
    """Return the sizes in `text_encoder/config.json`.

    Args:
      config_json: the file's entries.
      name: what the messages call the file, usually its path.

    Raises:
      UserError: naming a missing or wrong field, or the architecture when it is not a gated-GELU umT5.
    """
    if config_json.get("model_type") != "umt5":
        raise UserError(f"{name}: model_type is {config_json.get('model_type')!r}; only 'umt5' text encoders are known")
    activation = config_json.get("feed_forward_proj", "gated-gelu")
    if activation != "gated-gelu":
        raise UserError(f"{name}: feed_forward_proj is {activation!r}, only 'gated-gelu' is known")
    values = {}
    for ours, theirs in _CONFIG_FIELDS.items():
        if theirs not in config_json:
            raise UserError(f"{name}: the field {theirs!r} is missing; it is no umT5 config")
        value, kind = config_json[theirs], (float if ours == "eps" else int)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0 or kind(value) != value:
            raise UserError(f"{name}: the field {theirs!r} is {value!r}; it must be a positive {kind.__name__}")
        values[ours] = kind(value)
    return UMT5Config(**values)


def config_to_diffusers(config: UMT5Config) -> dict[str, Any]:
    """Return the config.json with which transformers' UMT5EncoderModel reads the weights that we export."""
    sizes = {theirs: getattr(config, ours) for ours, theirs in _CONFIG_FIELDS.items()}
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        **sizes,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": True,
        "use_cache": False,
    }
