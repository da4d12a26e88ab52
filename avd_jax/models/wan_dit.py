"""The Wan2.1 text-to-video diffusion transformer (wan/modules/model.py, arXiv 2503.20314).

Attribute names are Wan's own, so that the conversion tables stay short. The blocks' parameters are stacked along a
leading layer axis and applied with `lax.scan`: one block is compiled, not 30.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Float

from avd_jax.errors import UserError
from avd_jax.models import rope
from avd_jax.models.attention import attention, check_heads, keep_attention
from avd_jax.models.linear import Linear, Projection
from avd_jax.models.norms import MOMENTS_NAME, layer_norm, rms_norm
from avd_jax.models.placement import Placement, fetched
from avd_jax.shapes import Array, Heads, Latents, PromptEmbeds, Timesteps, Tokens, typechecked

Gate = Float[Array, "batch dim"]

# Two numbers a token for each norm spare a pass over all channels.
_KEEP_MOMENTS = jax.checkpoint_policies.save_only_these_names(MOMENTS_NAME)
REMAT_POLICIES = {
    "none": None,  # keep every activation
    "block": _KEEP_MOMENTS,  # and of each block its input only
    # Attention's forward kernel runs once.
    "save_attention": jax.checkpoint_policies.save_from_both_policies(keep_attention, _KEEP_MOMENTS),
}


@dataclasses.dataclass(frozen=True)
class WanDiTConfig:
    """Sizes of a WanDiT; the defaults are Wan2.1-T2V-1.3B."""

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    def __post_init__(self):
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise UserError(
                f"dim={self.dim} must be num_heads={self.num_heads} times an even number; change one of them"
            )

    @property
    def head_dim(self) -> int:
        """Width K of one attention head."""
        return self.dim // self.num_heads


WAN_1_3B = WanDiTConfig()
WAN_14B = WanDiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
WAN_MODELS = {"1.3B": WAN_1_3B, "14B": WAN_14B}


class ProjectToHeads(Projection):
    """Linear map from tokens [B N D] to heads [B H N K]: kernel [D H K], bias [H K]."""

    cut = -3

    def __init__(self, config: WanDiTConfig, *, rngs: nnx.Rngs, dtype, param_dtype):
        shape = (config.dim, config.num_heads, config.head_dim)
        super().__init__(shape, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

    def __call__(self, x: Tokens, *, placement: Placement | None = None) -> Heads:
        """Project, heads before tokens; `placement` as in `Projection.apply`."""
        return self.apply("bnd,dhk->bhnk", x, placement=placement)


class ProjectFromHeads(Projection):
    """Linear map from heads [B H N K] back to tokens [B N D]: kernel [H K D], bias [D]."""

    input_axes = 2
    cut = -1

    def __init__(self, config: WanDiTConfig, *, rngs: nnx.Rngs, dtype, param_dtype):
        shape = (config.num_heads, config.head_dim, config.dim)
        super().__init__(shape, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

    def __call__(self, x: Heads, *, gate: Gate | None = None, placement: Placement | None = None) -> Tokens:
        """Project, summing over heads; with a gate [B D], as `gated_project` does."""
        return self.apply("bhnk,hkd->bnd", x, gate, placement)


class HeadsRMSNorm(nnx.Module):
    """RMS norm over all heads' channels together, as Wan normalises queries and keys: scale [H K]."""

    def __init__(self, config: WanDiTConfig):
        self.scale = nnx.Param(jnp.ones((config.num_heads, config.head_dim), jnp.float32))
        self.eps = config.eps

    def __call__(self, x: Heads, *, factor: float = 1.0) -> Heads:
        """Normalise, times `factor`."""
        return rms_norm(x, scale=factor * self.scale[...], eps=self.eps)


class Attention(nnx.Module):
    """Multi-head attention with normalised queries and keys; keys and values come from `context`."""

    def __init__(self, config: WanDiTConfig, *, rngs: nnx.Rngs, dtype, param_dtype):
        make = functools.partial(ProjectToHeads, config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.q, self.k, self.v = make(), make(), make()
        self.o = ProjectFromHeads(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.norm_q, self.norm_k = HeadsRMSNorm(config), HeadsRMSNorm(config)

    def __call__(
        self,
        x: Tokens,
        context: Tokens,
        *,
        placement: Placement,
        rotation: rope.Rotation | None = None,
        valid_keys: int | None = None,
        gate: Gate | None = None,
    ) -> Tokens:
        """Attend from `x` [B N D] to `context` [B M D], of which the first `valid_keys` count.

        `rotation` (self-attention only) carries the positions. With a `gate` the result is times that, in float32.
        """
        # The scale of the scores goes into a few numbers; as a factor of the queries it would be rounded once more.
        query = self.q(x, placement=placement)
        key, value = self.norm_k(self.k(context, placement=placement)), self.v(context, placement=placement)
        query = self.norm_q(query, factor=query.shape[-1] ** -0.5)
        if rotation is not None:
            query, key = rope.rotate(query, *rotation), rope.rotate(key, *rotation)
        attended = attention(query, key, value, placement=placement, valid_keys=valid_keys, scale=1.0)
        return self.o(attended, gate=gate, placement=placement)


def modulated_norm(x: Tokens, *, shift: Array, scale: Array, eps: float, dtype=jnp.float32) -> Tokens:
    """Layer norm without weights, then `(1 + scale) * x + shift` per example; float32, the result in `dtype`."""
    return layer_norm(x, factor=1 + scale, shift=shift, eps=eps, dtype=dtype)


class Block(nnx.Module):
    """Self-attention, cross-attention to the text, feed-forward; the first and last modulated by the timestep."""

    def __init__(self, config: WanDiTConfig, *, rngs: nnx.Rngs, dtype, param_dtype):
        linear = functools.partial(Linear, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.self_attn = Attention(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.norm3 = nnx.LayerNorm(config.dim, epsilon=config.eps, rngs=rngs, dtype=jnp.float32)
        self.cross_attn = Attention(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.ffn_0 = linear(config.dim, config.ffn_dim)
        self.ffn_2 = linear(config.ffn_dim, config.dim, cut=-1)
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (6, config.dim)) * config.dim**-0.5)
        self.eps, self.dtype = config.eps, dtype

    def __call__(
        self,
        x: Tokens,
        timestep_modulation: Float[Array, "batch 6 dim"],
        context: Tokens,
        rotation: rope.Rotation,
        *,
        placement: Placement,
        valid_tokens: int,
    ) -> Tokens:
        """Return the block's output, float32; `x` comes in any dtype.

        Tokens of `x` from `valid_tokens` on are padding, to which no other token attends.
        """
        modulation = self.modulation[...] + timestep_modulation
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = jnp.moveaxis(modulation, 1, 0)
        x = x.astype(jnp.float32)
        normed = modulated_norm(x, shift=shift_attn, scale=scale_attn, eps=self.eps, dtype=self.dtype)
        attend = functools.partial(
            self.self_attn, normed, normed, placement=placement, rotation=rotation, valid_keys=valid_tokens
        )
        # Where examples' tokens are cut, each example's gradient of a kernel would be summed over the devices apart.
        own_gates = placement.on_tpu and placement.sequence_shards == 1
        x = x + (attend(gate=gate_attn) if own_gates else attend().astype(jnp.float32) * gate_attn[:, None])
        x = x + self.cross_attn(self._norm3(x), context, placement=placement).astype(jnp.float32)
        normed = modulated_norm(x, shift=shift_ffn, scale=scale_ffn, eps=self.eps, dtype=self.dtype)
        # Else the TPU compiler makes the float32 stream part of both products, which slows them down by half.
        hidden = self.ffn_0(jax.lax.optimization_barrier(normed), placement=placement)
        hidden = jax.nn.gelu(hidden, approximate=True)
        if own_gates:
            return x + self.ffn_2(hidden, gate=gate_ffn, placement=placement)
        added = jax.lax.optimization_barrier(self.ffn_2(hidden, placement=placement))
        return x + added.astype(jnp.float32) * gate_ffn[:, None]

    def _norm3(self, x: Tokens) -> Tokens:
        factor, shift = (
            jnp.broadcast_to(leaf[...], (x.shape[0], x.shape[-1])) for leaf in (self.norm3.scale, self.norm3.bias)
        )
        return layer_norm(x, factor=factor, shift=shift, eps=self.eps, dtype=self.dtype)


class Head(nnx.Module):
    """Modulated norm and the projection of each token to its patch of velocities, in float32 throughout."""

    def __init__(self, config: WanDiTConfig, *, rngs: nnx.Rngs):
        outputs = math.prod(config.patch_size) * config.out_dim
        self.head = Linear(config.dim, outputs, rngs=rngs, dtype=jnp.float32, param_dtype=jnp.float32)
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (2, config.dim)) * config.dim**-0.5)
        self.eps = config.eps

    def __call__(self, x: Tokens, timestep_embedding: Float[Array, "batch dim"]) -> Tokens:
        """Return [B N patch*out_dim]."""
        modulation = self.modulation[...] + timestep_embedding[:, None]
        return self.head(modulated_norm(x, shift=modulation[:, 0], scale=modulation[:, 1], eps=self.eps))


def timestep_features(timesteps: Timesteps, dim: int) -> Float[Array, "batch dim"]:
    """Return the sinusoidal features [cos | sin] of timesteps 0..1000, float32 [B dim]."""
    frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class WanDiT(nnx.Module):
    """The transformer: `velocity = dit(latents, timesteps, prompt_embeds)`.

    Args:
      config: sizes.
      rngs: initial random weights; `nnx.eval_shape` builds the abstract model.
      dtype: compute dtype of the matrix products.
      param_dtype: dtype of the stored parameters. As in Wan's own code the residual stream, the norms, the timestep's
        path, the modulation and the head are float32 whatever it is, and so are their parameters: rounding them
        costs as many digits as rounding all others.
      remat: what the backward pass keeps of each block, a key of REMAT_POLICIES.
      placement: the devices and the attention kernel; an attribute that can be set later.

    Raises:
      UserError: an unknown `remat`, or heads that the placement's sequence axis does not divide.
    """

    def __init__(
        self,
        config: WanDiTConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat: str = "none",
        placement: Placement = Placement(),  # noqa: B008 - it is frozen
    ):
        if remat not in REMAT_POLICIES:
            raise UserError(f"remat={remat!r} is not one of {', '.join(REMAT_POLICIES)}")
        check_heads(config.num_heads, placement.sequence_shards)
        linear = functools.partial(Linear, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.config, self.dtype, self.remat, self.placement = config, dtype, remat, placement
        self.patch_embedding = linear(config.in_dim * math.prod(config.patch_size), config.dim)
        self.text_embedding_0 = linear(config.text_dim, config.dim)
        self.text_embedding_2 = linear(config.dim, config.dim)
        # One vector an example, which scales every block.
        exact = functools.partial(Linear, rngs=rngs, dtype=jnp.float32, param_dtype=jnp.float32)
        self.time_embedding_0 = exact(config.freq_dim, config.dim)
        self.time_embedding_2 = exact(config.dim, config.dim)
        self.time_projection_1 = exact(config.dim, 6 * config.dim)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
        def make_blocks(rngs):
            return Block(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

        self.blocks = make_blocks(rngs)
        self.head = Head(config, rngs=rngs)

    @typechecked
    def __call__(
        self, latents: Latents, timesteps: Timesteps, prompt_embeds: PromptEmbeds, *, frame_stride: int = 1
    ) -> Float[Array, "batch frames height width out_channels"]:
        """Predict the velocity `noise - x0` of noisy latents.

        Args:
          latents: noisy latents [B F H W in_dim]; H and W divisible by the patch.
          timesteps: 1000 * sigma of each example, [B].
          prompt_embeds: umT5 embeddings [B L text_dim], L <= text_len; zero after the last token, and padded with
            zeros to text_len here, since Wan attends to the padding too.
          frame_stride: distance of the frames' positions; 2 if every second frame of a clip is given.

        Returns:
          velocity [B F H W out_dim], float32.

        Raises:
          UserError: a size that the patch does not divide, or a text longer than text_len.
        """
        config = self.config
        tokens, grid = self._patchify(latents)
        embedding = self.time_embedding_0(timestep_features(timesteps, config.freq_dim))
        embedding = self.time_embedding_2(jax.nn.silu(embedding))
        modulation = rearrange(self.time_projection_1(jax.nn.silu(embedding)), "b (six d) -> b six d", six=6)
        context = self._embed_text(prompt_embeds)
        valid_tokens = tokens.shape[1]
        rotation = rope.rotation(*grid, config.head_dim, frame_stride=frame_stride)
        tokens, *rotation = self._pad(tokens, *rotation)

        tokens = _apply_blocks(
            *nnx.split(self.blocks),
            tokens,
            modulation,
            context,
            tuple(rotation),
            dtype=jnp.dtype(self.dtype),
            remat=self.remat,
            placement=self.placement,
            valid_tokens=valid_tokens,
        )
        patches = self.head(tokens, embedding)[:, :valid_tokens]
        frames, height, width = grid
        patch_t, patch_h, patch_w = config.patch_size
        velocity = rearrange(
            patches,
            "b (f h w) (p q r c) -> b (f p) (h q) (w r) c",
            f=frames,
            h=height,
            w=width,
            p=patch_t,
            q=patch_h,
            r=patch_w,
        )
        return velocity.astype(jnp.float32)  # samplers and losses subtract velocities of nearly equal size

    def _patchify(self, latents: Latents) -> tuple[Tokens, tuple[int, int, int]]:
        sizes = latents.shape[1:4]
        for name, size, patch in zip(("frames", "height", "width"), sizes, self.config.patch_size, strict=True):
            if size % patch:
                raise UserError(f"latent {name} is {size}, which the patch size {patch} does not divide")
        grid = tuple(size // patch for size, patch in zip(sizes, self.config.patch_size, strict=True))
        patch_t, patch_h, patch_w = self.config.patch_size
        patches = rearrange(
            latents,
            "b (f p) (h q) (w r) c -> b (f h w) (p q r c)",
            p=patch_t,
            q=patch_h,
            r=patch_w,
        )
        return self.patch_embedding(patches).astype(jnp.float32), grid

    def _pad(self, tokens: Tokens, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """Pad the tokens and their rotation once for all blocks, so that devices and kernel blocks divide them."""
        missing = self.placement.padded_tokens(tokens.shape[1], self.dtype) - tokens.shape[1]
        tokens = self.placement.constrain(jnp.pad(tokens, ((0, 0), (0, missing), (0, 0))))
        return tokens, *(jnp.pad(angles, ((0, missing), (0, 0))) for angles in (cos, sin))

    def _embed_text(self, prompt_embeds: PromptEmbeds) -> Tokens:
        missing = self.config.text_len - prompt_embeds.shape[1]
        if missing < 0:
            raise UserError(
                f"prompt_embeds have {prompt_embeds.shape[1]} tokens, the model takes {self.config.text_len}"
            )
        padded = jnp.pad(prompt_embeds, ((0, 0), (0, missing), (0, 0)))
        context = self.text_embedding_2(jax.nn.gelu(self.text_embedding_0(padded), approximate=True))
        return context.astype(jnp.float32)  # so that the blocks' gradients are added up in float32


# Jitted here, once for all calls: a user who calls the model eagerly would otherwise compile the scan each time.
@functools.partial(jax.jit, static_argnums=0, static_argnames=("dtype", "remat", "placement", "valid_tokens"))
def _apply_blocks(
    graphdef: nnx.GraphDef,
    stacked: nnx.State,
    x,
    modulation,
    context,
    rotation,
    *,
    dtype,
    remat: str,
    placement: Placement,
    valid_tokens: int,
):
    def added_by_block(seen, block_state):
        block = nnx.merge(graphdef, fetched(block_state))
        y = block(seen, modulation, context, rotation, placement=placement, valid_tokens=valid_tokens)
        return y - seen.astype(jnp.float32)

    if placement.on_tpu:
        rotation = rope.for_matrix_units(rotation)
    policy = REMAT_POLICIES[remat]
    if policy is not None:
        added_by_block = jax.checkpoint(added_by_block, policy=policy, prevent_cse=False)

    def apply_block(carried, block_state):
        # What a block sees is what the backward pass keeps: half as much in half precision. The stream itself, to which
        # many blocks each add little, is float32. It is rounded where it is written, and so need not be read for that.
        x, seen = carried
        x = placement.constrain(x + added_by_block(seen, block_state))
        return (x, x.astype(dtype)), None

    (x, _), _ = jax.lax.scan(apply_block, (x, x.astype(dtype)), stacked)
    return x
