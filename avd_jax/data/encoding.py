"""The text encoder and the VAE, compiled: texts to embeddings, videos to latents and back, whatever asks for it."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from avd_jax.data.latents import BFLOAT16
from avd_jax.models.placement import has_large_vmem
from avd_jax.models.vae_tiles import MEMORY_GIB
from avd_jax.models.wan_vae import WanVAE, computing_in
from avd_jax.parallel.compiler import convolution_options
from avd_jax.parallel.mesh import BATCH_AXES

FINGERPRINT_VALUES = 16  # of each parameter; a retrained network differs in nearly all of them


@dataclass(frozen=True)
class TextEncoder:
    """Texts to embeddings.

    Attributes:
      encode: texts -> one [L_i text_dim] a text, without padding.
      text_len: tokens that the network sees, padding included.
      fingerprint: identifies the weights.
      at_work: a context within which `encode` is called; the network may be elsewhere otherwise.
    """

    encode: Callable[[Sequence[str]], list[np.ndarray]]
    text_len: int
    fingerprint: str
    at_work: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class VideoEncoder:
    """Videos to latents.

    Attributes:
      encode: [B F H W 3] in [-1, 1] -> normalised latents [B f h w C]; traceable by JAX.
      fingerprint: identifies the weights.
    """

    encode: Callable[[jax.Array], jax.Array]
    fingerprint: str


def fingerprint(module: nnx.Module) -> str:
    """Return a short text that identifies a network's weights, whatever file format or float type they come in."""
    digest = hashlib.sha256()
    leaves = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(module))}
    for path, leaf in sorted(leaves.items()):
        # Only these few values leave the device.
        values = leaf[(0,) * (leaf.ndim - 1)][:FINGERPRINT_VALUES] if leaf.ndim else leaf
        digest.update(f"{path} {leaf.shape}".encode())
        digest.update(np.asarray(values).astype(BFLOAT16).tobytes())
    return digest.hexdigest()[:16]


def text_encoder(
    umt5: nnx.Module, tokenizer: Callable, *, takes_turns: bool = False, program: Callable | None = None
) -> TextEncoder:
    """Return umT5 with its tokenizer, compiled.

    Args:
      umt5: the network.
      tokenizer: texts -> input ids and mask, both [B text_len].
      takes_turns: whether the network's parameters wait in the host's memory when it is not at work, so that another
        one, which does not fit beside it, can have the device. On a CPU both are one memory, and nothing is copied.
      program: from `text_program`, if it is compiled already, for one text at a time.
    """
    made_by = fingerprint(umt5)
    if takes_turns:
        nnx.update(umt5, jax.device_get(nnx.state(umt5)))
    graphdef, state = nnx.split(umt5)
    run = program or text_program(graphdef)
    held = [state]

    @contextmanager
    def at_work() -> Iterator[None]:
        held.append(jax.device_put(state))
        try:
            yield
        finally:
            held.pop()

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        ids, mask = tokenizer(list(texts))
        embeds = np.asarray(run(held[-1], ids, mask))
        return [row[:length] for row, length in zip(embeds, np.asarray(mask).sum(1), strict=True)]

    text_len = tokenizer([""])[0].shape[1]
    return TextEncoder(encode, text_len, made_by, at_work if takes_turns else nullcontext)


@lru_cache(maxsize=1)
def text_program(graphdef: nnx.GraphDef) -> Callable:
    """Return the jitted `(state, ids, mask) -> embeddings`, bfloat16, of a split umT5; the same for one like the last.

    So whoever opens a network again does not compile it again.
    """
    return jax.jit(lambda state, ids, mask: nnx.merge(graphdef, state)(ids, mask).astype(jnp.bfloat16))


def video_encoder(vae: nnx.Module, *, memory_gib: float = MEMORY_GIB) -> VideoEncoder:
    """Compile the encoder of Wan's VAE.

    It stays in float32, which `load_vae` gives it and `vae_layers.PRECISION` describes: bfloat16 changes the latents of
    the trained small VAE by 2.0e-2 (relative RMS), ten times what storing them in bfloat16 does.

    Args:
      vae: see `WanVAE`.
      memory_gib: what it may take of a device; see `WanVAE.encode`, also for the errors of the result.
    """
    graphdef, state = nnx.split(vae)
    run = encoder_program(graphdef, platform=jax.default_backend(), memory_gib=memory_gib)
    return VideoEncoder(partial(run, state), fingerprint=fingerprint(vae))


def encoder_program(graphdef: nnx.GraphDef, *, platform: str, memory_gib: float = MEMORY_GIB) -> Callable:
    """Return the compiled `encode(state, video)` of a split VAE."""
    return jax.jit(
        lambda state, video: nnx.merge(graphdef, state).encode(video, memory_gib=memory_gib),
        compiler_options=convolution_options(platform),
    )


def video_decoder(
    vae: WanVAE, *, mesh: Mesh | None = None, memory_gib: float = MEMORY_GIB, program: Callable | None = None
) -> Callable[[jax.Array], jax.Array]:
    """Return a compiled function from latents [B F H W C] to videos, see `WanVAE.decode`.

    Args:
      vae: its weights. It computes in `decoding_dtype`.
      mesh: whose batch axes share the clips out, B being a multiple of their size; None: one device takes all.
      memory_gib: what it may take of a device.
      program: from `decoder_program`, if it is compiled already.
    """
    device = mesh.devices.flat[0] if mesh else jax.devices()[0]
    graphdef, state = nnx.split(decoding_on(vae, device))
    made_for = {"platform": device.platform, "mesh": mesh, "memory_gib": memory_gib}
    return partial(program or decoder_program(graphdef, **made_for), state)


def decoding_on(vae: WanVAE, device: jax.Device) -> WanVAE:
    """Return the VAE as it decodes on a device: in `decoding_dtype`, with kernels where the device takes them."""
    return computing_in(vae, decoding_dtype(device.platform), tpu_kernels=has_large_vmem(device))


def decoding_dtype(platform: str) -> jnp.dtype:
    """Return what videos are decoded in: bfloat16, and float32 on CPUs, which gain nothing by less.

    With the trained small VAE the two are 56 dB apart; to round pixels to 8 bits costs 59 dB.
    """
    return jnp.dtype(jnp.float32 if platform == "cpu" else jnp.bfloat16)


@lru_cache(maxsize=1)
def decoder_program(
    graphdef: nnx.GraphDef, *, platform: str, mesh: Mesh | None = None, memory_gib: float = MEMORY_GIB
) -> Callable:
    """Return the compiled `decode(state, latents)` of a split VAE; the same for one like the last, as `text_program`.

    Arguments are those of `video_decoder`.
    """

    def decode(state, latents):
        return nnx.merge(graphdef, state).decode(latents, memory_gib=memory_gib)

    program = decode
    if mesh:
        clips = PartitionSpec(BATCH_AXES)
        specs = {"in_specs": (PartitionSpec(), clips), "out_specs": clips}
        program = jax.shard_map(decode, mesh=mesh, check_vma=False, **specs)
    return jax.jit(program, compiler_options=convolution_options(platform))
