"""From texts to pixels: which network is on the devices when, and which devices share what.

The text encoder comes first and leaves before the others are loaded. Then each batch is sampled and decoded. If the
transformer and the decoder do not fit beside each other, a few batches are sampled, the transformer leaves, they are
decoded, and its parameters are read again for the next ones. All hosts do the same and get the same.

Programs are compiled from the parameters' shapes while networks are loaded and run.
"""

import contextlib
import functools
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from avd_jax.convert.weights import load_module, lossless_dtype
from avd_jax.data.encoding import (
    TextEncoder,
    decoder_program,
    decoding_on,
    text_encoder,
    text_program,
    video_decoder,
)
from avd_jax.data.latents import BFLOAT16, pad_prompt_embeds
from avd_jax.errors import UserError, note
from avd_jax.generation.low_bit import load_low_bit
from avd_jax.generation.pipeline import (
    HalfRateSampling,
    LatentsShape,
    Steps,
    sample_keys,
    student_steps,
    teacher_steps,
)
from avd_jax.generation.prompt_cache import PromptCache
from avd_jax.generation.settings import Job, Settings
from avd_jax.generation.weights import Parts
from avd_jax.models.functional import Denoiser, Params, denoiser
from avd_jax.models.placement import Placement
from avd_jax.models.vae_tiles import MEMORY_GIB
from avd_jax.parallel.hosts import to_host
from avd_jax.parallel.memory import is_exhausted
from avd_jax.parallel.mesh import BATCH_AXES, batch_sharding, make_mesh, placed, replicated
from avd_jax.parallel.rules import spec_for, tree_shardings

SAMPLED_BEFORE_DECODING = 8  # batches, if the transformer has to leave for the decoder; a kill loses so many at most


def generation_mesh(
    videos: int,
    heads: int,
    *,
    fsdp: int = 1,
    seq: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Return the mesh over all devices, or those that are given.

    Args:
      videos: how many are to be made.
      heads: attention heads of the transformer, which the devices that share tokens share too.
      fsdp: devices that share one copy of the transformer.
      seq: devices that share a video's tokens. By default 1, if there is a video for each device; else as many devices
        of a host as leave none without a video.
      devices: None for those of all hosts.

    Raises:
      UserError: sizes that do not divide the devices or the heads.
    """
    count = jax.device_count() if devices is None else len(devices)
    if fsdp < 1 or count % fsdp:
        raise UserError(f"--fsdp {fsdp}: give a divisor of the number of devices, which is {count}")
    possible = [n for n in range(1, heads + 1) if heads % n == 0 and (count // fsdp) % n == 0]
    if seq is None:
        enough = [n for n in possible if count // n >= videos and jax.local_device_count() % n == 0]
        seq = max(enough, default=1)
    elif seq not in possible:
        shown = ", ".join(map(str, possible))
        raise UserError(
            f"--seq {seq}: give one of {shown}: it must divide the transformer's {heads} attention heads, and with "
            f"--fsdp {fsdp} the {count} devices"
        )
    return make_mesh(fsdp=fsdp, seq=seq, devices=devices)


def sample_videos(
    settings: Settings,
    parts: Parts,
    shape: LatentsShape,
    jobs: Sequence[Job],
    *,
    mesh: Mesh,
    size: int,
    cache: PromptCache | None = None,
    vae_gib: float = MEMORY_GIB,
    on_step: Callable[[], object] | None = None,
) -> Iterator[tuple[Job, np.ndarray]]:
    """Yield each job with its video [F H W 3], nominally in [-1, 1].

    Args:
      settings: of all jobs.
      parts: opened weights.
      shape: (F, H, W, C) of the latents of a video.
      jobs: what to make.
      mesh: see `generation_mesh`.
      size: videos of a batch, a multiple of the mesh's batch shards.
      cache: of prompt embeddings, or None.
      vae_gib: what decoding may take of a device, in as many tiles as that needs.
      on_step: called after every denoising step of a batch, from another thread.

    Raises:
      UserError: values that are not finite.
    """
    batches = [list(jobs[i : i + size]) for i in range(0, len(jobs), size)]
    made, crowded = set(), False
    with Counter(on_step) as count, _compiling() as meanwhile:
        traced = _traced_decoder(parts, (size, *shape), mesh, vae_gib)

        def encoded() -> dict[str, np.ndarray]:
            encoder = functools.cache(lambda: text_encoder_of(parts, settings.dtype))
            found = embeddings_of(texts_of(settings, jobs), cache, encoder)
            del encoder
            gc.collect()  # the text encoder is larger than the transformer, and its modules are cycles of references
            return found

        # A GPU's compiler tries kernels on the device, which the text encoder may fill.
        texts = encoded() if mesh.devices.flat[0].platform == "gpu" else None
        ahead = not settings.weights_dtype  # else what is stored in few bits shows when it is read
        steps = meanwhile.submit(_compiled_steps, settings, parts, shape, mesh, size) if ahead else None
        decoder = meanwhile.submit(_compiled_decoder, traced)
        texts = encoded() if texts is None else texts
        vae = load_module(parts.vae, jnp.float32, lambda path, leaf: replicated(mesh))
        decode = video_decoder(vae, mesh=mesh, program=lambda *inputs: decoder.result()(*inputs))
        sampler = _Sampler(settings, parts, shape, texts, mesh, size, steps, count)
        try:
            for batch, videos in zip(batches, _side_by_side(sampler, decode, batches), strict=True):
                for job, pixels in _rows(batch, videos):
                    made.add(job)
                    yield job, pixels
        except jax.errors.JaxRuntimeError as error:
            if not is_exhausted(error):
                raise
            crowded = True
        if crowded:  # outside the handler, which holds the arrays of what failed
            note("the transformer and the decoder do not fit into memory together: they take turns")
            sampler.leave()
            batches = [batch for batch in batches if not made.issuperset(batch)]
            for batch, videos in zip(batches, _in_turns(sampler, decode, batches), strict=True):
                yield from ((job, pixels) for job, pixels in _rows(batch, videos) if job not in made)


def _side_by_side(sampler: "_Sampler", decode: Callable, batches: Sequence[list[Job]]) -> Iterator[jax.Array]:
    """Yield the videos of each batch; the devices work on the next batch while one is written."""
    running = decode(sampler(batches[0]))
    for following in [*batches[1:], None]:
        done, running = running, decode(sampler(following)) if following else None
        yield done


def _in_turns(sampler: "_Sampler", decode: Callable, batches: Sequence[list[Job]]) -> Iterator[jax.Array]:
    """Yield the videos of each batch; the transformer is not on the devices while one is decoded."""
    for first in range(0, len(batches), SAMPLED_BEFORE_DECODING):
        sampled = [jax.block_until_ready(sampler(batch)) for batch in batches[first : first + SAMPLED_BEFORE_DECODING]]
        sampler.leave()
        for latents in sampled:
            yield decode(latents)


def _rows(batch: list[Job], videos: jax.Array) -> Iterator[tuple[Job, np.ndarray]]:
    for row, job in enumerate(batch):
        yield job, checked(job, to_host(videos[row]))


class _Sampler:
    """From a batch of jobs to latents [B F H W C]; its transformer is loaded when it is needed."""

    def __init__(
        self,
        settings: Settings,
        parts: Parts,
        shape: LatentsShape,
        texts: dict[str, np.ndarray],
        mesh: Mesh,
        size: int,
        compiled: Future[Steps] | None,
        count: Callable[[jax.Array], object],
    ):
        self._settings, self._parts, self._shape, self._mesh, self._size = settings, parts, shape, mesh, size
        self._params = self._sample = None
        self._compiled, self._texts, self._negative = compiled, texts, ()
        if settings.solver == "unipc":
            self._negative = (self._conditions(self._padded(settings.negative_prompt), replicated(mesh)),)
        self._keys = jax.jit(sample_keys, out_shardings=batch_sharding(mesh))
        self._count = count

    def leave(self) -> None:
        """Free the transformer's parameters; the next call loads them again."""
        self._params = None
        gc.collect()

    def __call__(self, batch: list[Job]) -> jax.Array:
        """Start to sample a batch, filled up to the batch size."""
        rows = batch + batch[-1:] * (self._size - len(batch))
        keys = self._keys(np.asarray([job.seed for job in rows], np.uint32))
        texts = self._conditions(np.stack([self._padded(job.prompt) for job in rows]), batch_sharding(self._mesh))
        if self._params is None:
            network, self._params = load_transformer(self._parts, self._settings, self._mesh)
            if self._sample is None:
                made = (network, self._settings, self._parts, self._shape, self._mesh)
                self._sample = self._compiled.result() if self._compiled else make_sampler(*made)
        return self._sample(self._params, keys, texts, *self._negative, on_step=self._count)

    def _padded(self, text: str) -> np.ndarray:
        return pad_prompt_embeds(self._texts[text], self._parts.transformer.config.text_len)

    def _conditions(self, embeds: np.ndarray, sharding: NamedSharding) -> dict[str, jax.Array]:
        return jax.device_put({"prompt_embeds": embeds}, sharding)


@contextlib.contextmanager
def _compiling() -> Iterator[ThreadPoolExecutor]:
    """Yield threads that compile; who leaves with an error does not wait for them."""
    threads = ThreadPoolExecutor(2)
    try:
        yield threads
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _compiled_steps(settings: Settings, parts: Parts, shape: LatentsShape, mesh: Mesh, size: int) -> Steps:
    """Return the sampler compiled for batches of a size, whose examples the mesh shares out; nothing is loaded."""
    network, params = abstract_transformer(parts, settings, mesh)
    share, model = batch_sharding(mesh), parts.transformer.config
    keys = placed(jax.eval_shape(sample_keys, jax.ShapeDtypeStruct((size,), jnp.uint32)), share)

    def conditions(sharding: NamedSharding, *rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        embeds = jax.ShapeDtypeStruct((*rows, model.text_len, model.text_dim), BFLOAT16, sharding=sharding)
        return {"prompt_embeds": embeds}

    negative = [conditions(replicated(mesh))] if settings.solver == "unipc" else []
    steps = make_sampler(network, settings, parts, shape, mesh)
    return steps.compiled(params, keys, conditions(share, size), *negative)


def _traced_decoder(parts: Parts, latents: tuple[int, ...], mesh: Mesh, vae_gib: float) -> jax.stages.Traced:
    """Return `decoder_program` for latents [B F H W C] of a shape, of which nothing is loaded.

    Raises:
      UserError: videos that are too large for `vae_gib`.
    """
    device = mesh.devices.flat[0]
    vae = parts.vae.architecture.abstract(parts.vae.config, jnp.float32)
    graphdef, state = nnx.split(nnx.eval_shape(lambda vae: decoding_on(vae, device), vae))
    decode = decoder_program(graphdef, platform=device.platform, mesh=mesh, memory_gib=vae_gib)
    clips = jax.ShapeDtypeStruct(latents, jnp.float32, sharding=batch_sharding(mesh))
    return decode.trace(placed(state, replicated(mesh)), clips)


def _compiled_decoder(traced: jax.stages.Traced) -> Callable:
    return traced.lower().compile()


def load_transformer(parts: Parts, settings: Settings, mesh: Mesh) -> tuple[Denoiser, Params]:
    """Return the network and its parameters, which the mesh's fsdp axis shares out."""
    dtype = jnp.dtype(settings.dtype)

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, spec_for(path, shape, mesh))

    if settings.weights_dtype:
        dit = load_low_bit(parts.transformer, dtype, settings.weights_dtype, sharding)
    else:
        dit = load_module(parts.transformer, dtype, sharding)
    dit.placement = _placement(mesh)
    return denoiser(dit)


def abstract_transformer(parts: Parts, settings: Settings, mesh: Mesh) -> tuple[Denoiser, Params]:
    """Return the network, and shapes, dtypes and shardings of the parameters that `load_transformer` returns for it.

    Not for parameters of few bits.
    """
    dit = parts.transformer.architecture.abstract(parts.transformer.config, jnp.dtype(settings.dtype))
    dit.placement = _placement(mesh)
    network, params = denoiser(dit)
    return network, jax.tree.map(lambda leaf, own: leaf.update(sharding=own), params, tree_shardings(params, mesh))


def _placement(mesh: Mesh) -> Placement:
    return Placement(mesh=mesh, batch_axes=BATCH_AXES, sequence_axis="seq")


def make_sampler(network: Callable, settings: Settings, parts: Parts, shape: LatentsShape, mesh: Mesh) -> Steps:
    """Return the sampler of a student, or the teacher's, which takes the negative conditions too; see `pipeline`.

    Nothing is compiled yet.
    """
    if settings.solver != "student":
        guidance = {"shift": settings.shift, "guidance_scale": settings.guidance_scale}
        return teacher_steps(network, shape, num_steps=settings.steps, **guidance, mesh=mesh)
    half_rate = None
    if settings.half_rate_steps:
        dtype = jnp.dtype(settings.dtype)
        interpolator = load_module(parts.interpolator, dtype, lambda path, leaf: replicated(mesh))
        half_rate = HalfRateSampling(settings.half_rate_steps, settings.half_rate_positions, interpolator)
    return student_steps(network, shape, timesteps=settings.timesteps, half_rate=half_rate, mesh=mesh)


class Counter:
    """Calls a function once each of some arrays is there, in their order, from a thread of its own."""

    def __init__(self, function: Callable[[], object] | None):
        self._function, self._thread = function, ThreadPoolExecutor(1)

    def __call__(self, array: jax.Array) -> None:
        """Wait for an array in the background."""
        if self._function is not None:
            self._thread.submit(self._wait, array)

    def _wait(self, array: jax.Array) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # who uses the array learns of it
            jax.block_until_ready(array)
        self._function()

    def __enter__(self) -> "Counter":
        return self

    def __exit__(self, kind, *error) -> None:
        """Return once all have been counted; after an error at once."""
        self._thread.shutdown(wait=kind is None, cancel_futures=kind is not None)


def text_encoder_of(parts: Parts, dtype: str) -> TextEncoder:
    """Load the text encoder; its program, for one text at a time, is compiled meanwhile."""
    weights = parts.text_encoder
    param_dtype = lossless_dtype(weights, jnp.dtype(dtype))

    def compiled() -> Callable:
        graphdef, state = nnx.split(weights.architecture.abstract(weights.config, jnp.dtype(dtype)))
        state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, param_dtype), state)
        return text_program(graphdef).lower(state, *parts.tokenizer([""])).compile()

    with _compiling() as meanwhile:
        program = meanwhile.submit(compiled)
        umt5 = load_module(weights, jnp.dtype(dtype), param_dtype=param_dtype)
        return text_encoder(umt5, parts.tokenizer, program=program.result())


def embeddings_of(
    texts: Iterable[str], cache: PromptCache | None, encoder: Callable[[], TextEncoder]
) -> dict[str, np.ndarray]:
    """Return text -> embeddings [L_i text_dim] of its own tokens.

    Args:
      texts: in any order, also with repetitions.
      cache: of embeddings, or None.
      encoder: returns the text encoder; called for each text that is not kept.
    """
    found = {text: cache.get(text) if cache else None for text in texts}
    for text in found:
        if found[text] is None:
            # One at a time: a batch's last bits would depend on what else the run generates.
            found[text] = encoder().encode([text])[0]
            if cache:
                cache.keep(text, found[text])
    return found


def texts_of(settings: Settings, jobs: Iterable[Job]) -> list[str]:
    """Return the texts that have to be encoded."""
    negative = [] if settings.negative_prompt is None else [settings.negative_prompt]
    return [*(job.prompt for job in jobs), *negative]


def checked(job: Job, pixels: np.ndarray) -> np.ndarray:
    """Return the pixels of a video (UserError if they are not finite)."""
    if not np.isfinite(pixels).all():
        raise UserError(f"{job.prompt[:60]!r}, seed {job.seed}: not finite; try --dtype float32, or check the weights")
    return pixels
