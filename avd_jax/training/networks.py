"""The three networks of a run: one graph for generator and fake_score (float32 masters), one for the frozen teacher."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from avd_jax.models.wan_dit import WanDiT, WanDiTConfig

Params = dict  # nested dict of arrays, as `nnx.to_pure_dict` gives it


@dataclass(frozen=True)
class Network:
    """A network without its parameters: `network(params, latents, timesteps, prompt_embeds)`."""

    graphdef: nnx.GraphDef
    abstract: nnx.State

    def __call__(self, params: Params, latents, timesteps, prompt_embeds, **options):
        """Return the velocity, [B F H W C]; `options` as in `WanDiT`."""
        state = jax.tree.map(lambda leaf: leaf, self.abstract)  # a copy: the next line fills it in place
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self.graphdef, state)(latents, timesteps, prompt_embeds, **options)

    def abstract_params(self) -> Params:
        """Return the parameters' shapes and dtypes."""
        return nnx.to_pure_dict(self.abstract)


def make_network(config: WanDiTConfig, *, dtype: str, param_dtype: str, remat: str) -> Network:
    """Build the graph of a WanDiT without allocating its parameters."""

    def build() -> WanDiT:
        return WanDiT(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype), remat=remat)

    return Network(*nnx.split(nnx.eval_shape(build)))


def apply_of(module: nnx.Module) -> tuple[Callable, Params]:
    """Return a module as a function `(params, *inputs)` and its parameters."""
    graphdef, state = nnx.split(module)

    def apply(params: Params, *inputs):
        like = jax.tree.map(lambda leaf: leaf, state)  # a copy: the next line fills it in place
        nnx.replace_by_pure_dict(like, params)
        return nnx.merge(graphdef, like)(*inputs)

    return apply, nnx.to_pure_dict(state)


@dataclass(frozen=True)
class Networks:
    """What the steps apply: the trained graph (generator and fake_score) and the teacher's.

    `interpolator(params, latents)` makes the missing frames of half-rate steps; None where there are none.
    """

    student: Callable
    teacher: Callable
    interpolator: Callable | None = None
