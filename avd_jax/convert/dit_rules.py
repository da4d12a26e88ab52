"""Conversion tables of the diffusion transformer: Wan's own keys, diffusers' keys, and their configs.

Source: Wan2.1's wan/modules/model.py and diffusers' transformer_wan.py. The projections of self-attention carry the
rotary embedding, so their channels go from interleaved pairs to half-split ones (avd_jax/models/rope.py).
"""

import dataclasses

from avd_jax.convert.engine import Rule
from avd_jax.errors import UserError
from avd_jax.models.wan_dit import WanDiTConfig

# (our path, Wan's key, diffusers' key, layout); {} is the layer.
_LINEAR, _VECTOR, _ROW = "o i -> i o", "d -> d", "1 m d -> m d"


def _attention(config: WanDiTConfig, ours: str, wan: str, diffusers: str, *, rotary: bool):
    # A pair (2i, 2i+1) of Wan is (i, i + K/2) here.
    split, joined = ("(h p two)", "h (two p)") if rotary else ("(h k)", "h k")
    sizes = {"h": config.num_heads, "two": 2} if rotary else {"h": config.num_heads}
    heads = {"h": config.num_heads}
    for name in "qk":
        yield (
            f"{ours}.{name}.kernel",
            f"{wan}.{name}.weight",
            f"{diffusers}.to_{name}.weight",
            (f"{split} i -> i {joined}"),
            sizes,
        )
        yield f"{ours}.{name}.bias", f"{wan}.{name}.bias", f"{diffusers}.to_{name}.bias", f"{split} -> {joined}", sizes
        yield (
            f"{ours}.norm_{name}.scale",
            f"{wan}.norm_{name}.weight",
            f"{diffusers}.norm_{name}.weight",
            (f"{split} -> {joined}"),
            sizes,
        )
    yield f"{ours}.v.kernel", f"{wan}.v.weight", f"{diffusers}.to_v.weight", "(h k) i -> i h k", heads
    yield f"{ours}.v.bias", f"{wan}.v.bias", f"{diffusers}.to_v.bias", "(h k) -> h k", heads
    yield f"{ours}.o.kernel", f"{wan}.o.weight", f"{diffusers}.to_out.0.weight", "o (h k) -> h k o", heads
    yield f"{ours}.o.bias", f"{wan}.o.bias", f"{diffusers}.to_out.0.bias", _VECTOR, {}


def _linear(ours: str, wan: str, diffusers: str):
    yield f"{ours}.kernel", f"{wan}.weight", f"{diffusers}.weight", _LINEAR, {}
    yield f"{ours}.bias", f"{wan}.bias", f"{diffusers}.bias", _VECTOR, {}


def _table(config: WanDiTConfig):
    patch = dict(zip("pqr", config.patch_size, strict=True)) | {"c": config.in_dim}
    embedder = "condition_embedder"
    yield (
        "patch_embedding.kernel",
        "patch_embedding.weight",
        "patch_embedding.weight",
        "d c p q r -> (p q r c) d",
        patch,
    )
    yield "patch_embedding.bias", "patch_embedding.bias", "patch_embedding.bias", _VECTOR, {}
    for ours, wan, diffusers in (
        ("text_embedding_0", "text_embedding.0", f"{embedder}.text_embedder.linear_1"),
        ("text_embedding_2", "text_embedding.2", f"{embedder}.text_embedder.linear_2"),
        ("time_embedding_0", "time_embedding.0", f"{embedder}.time_embedder.linear_1"),
        ("time_embedding_2", "time_embedding.2", f"{embedder}.time_embedder.linear_2"),
        ("time_projection_1", "time_projection.1", f"{embedder}.time_proj"),
        ("head.head", "head.head", "proj_out"),
        ("blocks.ffn_0", "blocks.{}.ffn.0", "blocks.{}.ffn.net.0.proj"),
        ("blocks.ffn_2", "blocks.{}.ffn.2", "blocks.{}.ffn.net.2"),
    ):
        yield from _linear(ours, wan, diffusers)
    yield "head.modulation", "head.modulation", "scale_shift_table", _ROW, {}
    yield "blocks.modulation", "blocks.{}.modulation", "blocks.{}.scale_shift_table", _ROW, {}
    yield "blocks.norm3.scale", "blocks.{}.norm3.weight", "blocks.{}.norm2.weight", _VECTOR, {}
    yield "blocks.norm3.bias", "blocks.{}.norm3.bias", "blocks.{}.norm2.bias", _VECTOR, {}
    yield from _attention(config, "blocks.self_attn", "blocks.{}.self_attn", "blocks.{}.attn1", rotary=True)
    yield from _attention(config, "blocks.cross_attn", "blocks.{}.cross_attn", "blocks.{}.attn2", rotary=False)


def native_rules(config: WanDiTConfig) -> list[Rule]:
    """Return the table for Wan's own keys (also those of AVD's checkpoints, without their `model.` prefix)."""
    return [Rule(wan, ours, layout, sizes) for ours, wan, _, layout, sizes in _table(config)]


def diffusers_rules(config: WanDiTConfig) -> list[Rule]:
    """Return the table for diffusers' WanTransformer3DModel."""
    return [Rule(diffusers, ours, layout, sizes) for ours, _, diffusers, layout, sizes in _table(config)]


def config_from_native(entries: dict, *, name: str) -> WanDiTConfig:
    """Read Wan's `config.json` (keys it leaves out have Wan's defaults); `name` is its path, for messages."""
    if entries.get("model_type", "t2v") != "t2v":
        raise UserError(f"{name}: model_type is {entries['model_type']!r}; only text-to-video ('t2v') models are known")
    for flag in ("qk_norm", "cross_attn_norm"):
        if not entries.get(flag, True):
            raise UserError(f"{name}: {flag} is false; Wan2.1's text-to-video models have it true")
    known = {field.name for field in dataclasses.fields(WanDiTConfig)}
    values = {key: value for key, value in entries.items() if key in known}
    for key in ("dim", "ffn_dim", "num_heads", "num_layers"):
        if key not in values:
            raise UserError(f"{name}: the field {key!r} is missing; it is no Wan transformer config")
    if "patch_size" in values:
        values["patch_size"] = tuple(values["patch_size"])
    return WanDiTConfig(**values)


def config_to_native(config: WanDiTConfig) -> dict:
    """Return the entries of Wan's `config.json`."""
    entries = dataclasses.asdict(config) | {"patch_size": list(config.patch_size)}
    return {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": "t2v"} | entries


def config_from_diffusers(entries: dict, *, name: str) -> WanDiTConfig:
    """Read diffusers' `transformer/config.json`; `name` is its path, for messages."""
    for field in ("image_dim", "added_kv_proj_dim"):
        if entries.get(field) is not None:
            raise UserError(f"{name}: {field} is set; only text-to-video models are known, not image-to-video")
    try:
        heads, head_dim = entries["num_attention_heads"], entries["attention_head_dim"]
        return WanDiTConfig(
            dim=heads * head_dim,
            ffn_dim=entries["ffn_dim"],
            num_heads=heads,
            num_layers=entries["num_layers"],
            in_dim=entries["in_channels"],
            out_dim=entries["out_channels"],
            freq_dim=entries["freq_dim"],
            text_dim=entries["text_dim"],
            # Ours: diffusers leaves the padding to its pipeline, which has Wan's 512 tokens.
            text_len=entries.get("text_len", WanDiTConfig.text_len),
            patch_size=tuple(entries["patch_size"]),
            eps=entries["eps"],
        )
    except KeyError as error:
        raise UserError(
            f"{name}: the field {error.args[0]!r} is missing; it is no WanTransformer3DModel config"
        ) from None


def config_to_diffusers(config: WanDiTConfig) -> dict:
    """Return the entries of diffusers' `transformer/config.json`, and `text_len` if it is not Wan's 512."""
    text_len = {} if config.text_len == WanDiTConfig.text_len else {"text_len": config.text_len}
    return text_len | {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": "0.33.0",
        "added_kv_proj_dim": None,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": True,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": None,
        "in_channels": config.in_dim,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_dim,
        "patch_size": list(config.patch_size),
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }


def config_from_shapes(shapes: dict[str, tuple[int, ...]], *, name: str) -> WanDiTConfig:
    """Read the sizes off a single native file's shapes, for a file with no config beside it.

    Every Wan2.1 model has heads of 128 channels; smaller models have 64 if 128 does not divide the width.
    """
    try:
        dim, in_dim, *patch_size = shapes["patch_embedding.weight"]
        ffn_dim = shapes["blocks.0.ffn.0.weight"][0]
        text_dim = shapes["text_embedding.0.weight"][1]
        freq_dim = shapes["time_embedding.0.weight"][1]
        patch_out = shapes["head.head.weight"][0]
    except KeyError as error:
        raise UserError(f"{name}: the key {error.args[0]!r} is missing; it holds no Wan transformer") from None
    layers = {key.split(".")[1] for key in shapes if key.startswith("blocks.")}
    head_dim = 128 if dim % 128 == 0 else 64
    return WanDiTConfig(
        dim=dim,
        ffn_dim=ffn_dim,
        num_heads=dim // head_dim,
        num_layers=len(layers),
        in_dim=in_dim,
        out_dim=patch_out // (patch_size[0] * patch_size[1] * patch_size[2]),
        freq_dim=freq_dim,
        text_dim=text_dim,
        patch_size=tuple(patch_size),
    )
