"""Videos one at a time with networks that stay on the devices, for a page on which people wait.

The text encoder, a student, a teacher and the VAE stay where they are, and so do the programs of the last few sizes. A
checkpoint with other weights replaces the one in memory, once it has been read. If a device has no room for all, they
leave, and only what the video needs is loaded again.
"""

import gc
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from avd_jax.convert.weights import load_module
from avd_jax.data.encoding import TextEncoder, video_decoder
from avd_jax.data.latents import pad_prompt_embeds
from avd_jax.generation.pipeline import sample_keys
from avd_jax.generation.prompt_cache import PromptCache, cache_key
from avd_jax.generation.run import Opened
from avd_jax.generation.sampling import (
    checked,
    embeddings_of,
    generation_mesh,
    load_transformer,
    make_sampler,
    text_encoder_of,
    texts_of,
)
from avd_jax.generation.settings import Job, Settings
from avd_jax.models.functional import Denoiser, Params
from avd_jax.models.vae_tiles import MEMORY_GIB
from avd_jax.models.wan_dit import WanDiTConfig
from avd_jax.parallel.hosts import to_host
from avd_jax.parallel.memory import fitting, is_exhausted
from avd_jax.parallel.mesh import batch_sharding, filled_up, replicated

MOST_PROGRAMS = 6  # of a transformer; each is compiled for a size and a number of steps


@dataclass
class _Transformer:
    """A transformer on the devices: its weights by their fingerprint, its sizes, and the programs made for it."""

    made_of: str
    config: WanDiTConfig
    network: Denoiser
    params: Params
    programs: OrderedDict


def _way(settings: Settings) -> tuple[str, str | None]:
    """Return by what transformers are told apart, whatever their weights."""
    return settings.solver, settings.weights_dtype


class WarmModels:
    """Networks that stay loaded; it makes one video at a time, and is not for several threads."""

    def __init__(self, *, prompt_cache: Path | None = None, vae_gib: float = MEMORY_GIB):
        """Load nothing yet.

        Args:
          prompt_cache: folder in which prompts' embeddings are kept, or None.
          vae_gib: GiB of a device that decoding may take.
        """
        self._prompt_cache, self._vae_gib = prompt_cache, vae_gib
        self._transformers: dict[tuple[str, str | None], _Transformer] = {}
        self._encoder: TextEncoder | None = None
        self._decode: Callable | None = None

    def has(self, opened: Opened) -> bool:
        """Whether the transformer that the settings need is in memory."""
        there = self._transformers.get(_way(opened.settings))
        return there is not None and there.made_of == opened.fingerprints["transformer"]

    def leave(self) -> None:
        """Let all networks go."""
        self._transformers, self._encoder, self._decode = {}, None, None
        gc.collect()

    def mesh(self, opened: Opened) -> Mesh:
        """Return the devices that share a video."""
        return generation_mesh(1, opened.parts.transformer.config.num_heads)

    def make(
        self,
        opened: Opened,
        job: Job,
        *,
        on_step: Callable[[], object] = lambda: None,
        on_phase: Callable[[str], object] = lambda text: None,
    ) -> np.ndarray:
        """Return the video [F H W 3], nominally in [-1, 1].

        Args:
          opened: settings and opened weights; one student and one teacher are kept at a time.
          job: prompt and seed.
          on_step: called after every denoising step.
          on_phase: called with what is being done.

        Raises:
          UserError: it does not fit into memory, or is not finite.
        """
        settings, mesh = opened.settings, self.mesh(opened)
        what = f"{settings.frames} frames of {settings.height}x{settings.width}"
        with fitting(what, "ask for fewer frames or a smaller picture", mesh):
            try:
                return self._make(opened, job, mesh, on_step, on_phase)
            except (MemoryError, jax.errors.JaxRuntimeError) as error:
                if not is_exhausted(error):
                    raise
            self.leave()  # outside the handler, which holds the arrays of what failed
            return self._make(opened, job, mesh, on_step, on_phase)

    def _make(self, opened: Opened, job: Job, mesh: Mesh, on_step: Callable, on_phase: Callable) -> np.ndarray:
        settings, parts, size = opened.settings, opened.parts, filled_up(1, mesh)
        on_phase("reading the prompt")
        texts = embeddings_of(texts_of(settings, [job]), self._cache(opened), lambda: self._encoder_of(opened))
        on_phase("reading the weights")
        transformer = self._transformer(opened, mesh)
        sample = self._program(transformer, opened, mesh)
        if self._decode is None:
            vae = load_module(parts.vae, jnp.float32, lambda path, leaf: replicated(mesh))
            self._decode = video_decoder(vae, mesh=mesh, memory_gib=self._vae_gib)

        def conditions(text: str, rows: int | None, sharding) -> dict[str, jax.Array]:
            embeds = pad_prompt_embeds(texts[text], parts.transformer.config.text_len)
            embeds = embeds if rows is None else np.stack([embeds] * rows)
            return jax.device_put({"prompt_embeds": embeds}, sharding)

        share = batch_sharding(mesh)
        keys = jax.jit(sample_keys, out_shardings=share)(np.full(size, job.seed, np.uint32))
        negative = () if settings.negative_prompt is None else (settings.negative_prompt,)
        inputs = [conditions(text, None, replicated(mesh)) for text in negative]
        on_phase("sampling")

        def wait(latents: jax.Array) -> None:
            jax.block_until_ready(latents)
            on_step()

        latents = sample(transformer.params, keys, conditions(job.prompt, size, share), *inputs, on_step=wait)
        on_phase("decoding")
        return checked(job, to_host(self._decode(latents)[0]))

    def _cache(self, opened: Opened) -> PromptCache | None:
        if not self._prompt_cache:
            return None
        made_by = {"tokenizer": opened.fingerprints["tokenizer"], "dtype": opened.settings.dtype}
        return PromptCache(self._prompt_cache, cache_key(opened.parts.text_encoder, **made_by))

    def _encoder_of(self, opened: Opened) -> TextEncoder:
        if self._encoder is None:
            self._encoder = text_encoder_of(opened.parts, opened.settings.dtype)
        return self._encoder

    def _transformer(self, opened: Opened, mesh: Mesh) -> _Transformer:
        way, made_of = _way(opened.settings), opened.fingerprints["transformer"]
        config = opened.parts.transformer.config
        there = self._transformers.get(way)
        if there is None or there.made_of != made_of:
            network, params = load_transformer(opened.parts, opened.settings, mesh)
            programs = OrderedDict()
            if there is not None and there.config == config:  # compiled programs serve for the new weights
                network, programs = there.network, there.programs
            there = self._transformers[way] = _Transformer(made_of, config, network, params, programs)
        return there

    def _program(self, transformer: _Transformer, opened: Opened, mesh: Mesh) -> Callable:
        settings, programs = opened.settings, transformer.programs
        half_rate = (settings.half_rate_steps, settings.half_rate_positions, opened.fingerprints.get("interpolator"))
        guidance = (settings.shift, settings.guidance_scale)
        key = (opened.shape, settings.timesteps, settings.steps, *guidance, *half_rate)
        if key not in programs:
            programs[key] = make_sampler(transformer.network, settings, opened.parts, opened.shape, mesh)
        programs.move_to_end(key)
        while len(programs) > MOST_PROGRAMS:
            programs.popitem(last=False)
        return programs[key]
