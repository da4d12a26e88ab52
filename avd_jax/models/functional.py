"""A module as a pure function of its parameters: what training, samplers and compilers take in place of a module."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from avd_jax.models.adapters import AdapterParam, Adapters, add_adapters, has_adapters
from avd_jax.models.placement import Placement
from avd_jax.models.wan_dit import WanDiT, WanDiTConfig

Params = dict  # nested dict of arrays, as `nnx.to_pure_dict` gives it
Conditions = Any  # what a denoiser is told beside xt and the timestep, by name: {"prompt_embeds": [B L D]} for Wan


def filled(like: nnx.State, params: Params) -> nnx.State:
    """Return a state of the structure of `like` that holds `params`."""
    state = jax.tree.map(lambda leaf: leaf, like)  # a copy: the next line fills it in place
    nnx.replace_by_pure_dict(state, params)
    return state


@dataclass(frozen=True, eq=False)
class Functional:
    """A module without its parameters: `functional(params, *inputs)`."""

    graphdef: nnx.GraphDef
    abstract: nnx.State

    def __call__(self, params: Params, *inputs, **options):
        """Return what the module with these parameters returns."""
        return self.module(params)(*inputs, **options)

    def module(self, params: Params) -> nnx.Module:
        """Return the module with these parameters."""
        return nnx.merge(self.graphdef, filled(self.abstract, params))

    def abstract_params(self) -> Params:
        """Return the parameters' shapes and dtypes."""
        return nnx.to_pure_dict(self.abstract)


class Denoiser(Functional):
    """A network that predicts velocities: `network(params, xt, timesteps, conditions)`.

    Everything above the models passes `conditions`, a pytree of arrays whose first axis is the batch, through unseen.
    """

    def __call__(self, params: Params, xt, timesteps, conditions: Conditions, **options):
        """Return the velocity, [B F H W C]; `options` as in `WanDiT`."""
        return self.module(params)(xt, timesteps, **conditions, **options)


@dataclass(frozen=True, eq=False)
class Adaptable(Denoiser):
    """A denoiser that runs with the adapters that its parameters have, and without if they have none.

    Attributes:
      adapted: the network with adapters.
      new_adapters: seed -> parameters of adapters that change nothing yet; pure, to be called under `jax.jit`.
    """

    adapted: Denoiser
    new_adapters: Callable[[int], Params]

    def module(self, params: Params) -> nnx.Module:
        """Return the module with these parameters."""
        return self.adapted.module(params) if has_adapters(params) else super().module(params)


def functional(module: nnx.Module) -> tuple[Functional, Params]:
    """Return a module as a function of its parameters, and these."""
    return _split(Functional, module)


def unallocated(build: Callable[[], nnx.Module]) -> Functional:
    """Return the module that `build` makes as a function of its parameters, without allocating these."""
    return functional(nnx.eval_shape(build))[0]


def denoiser(module: nnx.Module) -> tuple[Denoiser, Params]:
    """Return a transformer as a denoiser and its parameters."""
    return _split(Denoiser, module)


def make_denoiser(
    config: WanDiTConfig,
    *,
    dtype: str,
    param_dtype: str,
    remat: str,
    placement: Placement = Placement(),  # noqa: B008 - it is frozen
    adapters: Adapters | None = None,
) -> Denoiser:
    """Return a WanDiT of some sizes as a denoiser, without allocating its parameters.

    With `adapters` it is `Adaptable`; raises a UserError as `add_adapters` does.
    """

    build = partial(_build, config, dtype, param_dtype, remat, placement)
    plain = _plain(config, dtype, param_dtype, remat, placement)
    if adapters is None:
        return plain

    def adapted(seed: int = 0) -> WanDiT:
        dit = build()
        add_adapters(dit, adapters, nnx.Rngs(seed))
        return dit

    def new_adapters(seed: int) -> Params:
        return nnx.to_pure_dict(nnx.state(adapted(seed), AdapterParam))

    return Adaptable(plain.graphdef, plain.abstract, denoiser(nnx.eval_shape(adapted))[0], new_adapters)


def _build(config: WanDiTConfig, dtype: str, param_dtype: str, remat: str, placement: Placement) -> WanDiT:
    dtypes = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(param_dtype)}
    return WanDiT(config, rngs=nnx.Rngs(0), remat=remat, placement=placement, **dtypes)


@lru_cache(maxsize=8)  # a run asks for the same network for its updates, its samples and its cost
def _plain(*args) -> Denoiser:
    return denoiser(nnx.eval_shape(partial(_build, *args)))[0]


def _split(kind: type[Functional], module: nnx.Module) -> tuple[Functional, Params]:
    graphdef, state = nnx.split(module)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    return kind(graphdef, shapes), nnx.to_pure_dict(state)
