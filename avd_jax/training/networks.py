"""The three networks of a run: one graph for generator and fake_score (float32 masters), one for the frozen teacher."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from avd_jax.models.placement import Placement, SplashBlocks
from avd_jax.models.wan_dit import WanDiT, WanDiTConfig
from avd_jax.parallel.mesh import BATCH_AXES

Params = dict  # nested dict of arrays, as `nnx.to_pure_dict` gives it


def filled(like: nnx.State, params: Params) -> nnx.State:
    """Return a state of the structure of `like` that holds `params`."""
    state = jax.tree.map(lambda leaf: leaf, like)  # a copy: the next line fills it in place
    nnx.replace_by_pure_dict(state, params)
    return state


@dataclass(frozen=True)
class Network:
    """A network without its parameters: `network(params, latents, timesteps, prompt_embeds)`."""

    graphdef: nnx.GraphDef
    abstract: nnx.State

    def __call__(self, params: Params, latents, timesteps, prompt_embeds, **options):
        """Return the velocity, [B F H W C]; `options` as in `WanDiT`."""
        return nnx.merge(self.graphdef, filled(self.abstract, params))(latents, timesteps, prompt_embeds, **options)

    def abstract_params(self) -> Params:
        """Return the parameters' shapes and dtypes."""
        return nnx.to_pure_dict(self.abstract)


def make_network(
    config: WanDiTConfig,
    *,
    dtype: str,
    param_dtype: str,
    remat: str,
    placement: Placement = Placement(),  # noqa: B008 - it is frozen
) -> Network:
    """Build the graph of a WanDiT without allocating its parameters."""

    def build() -> WanDiT:
        return WanDiT(
            config,
            rngs=nnx.Rngs(0),
            dtype=jnp.dtype(dtype),
            param_dtype=jnp.dtype(param_dtype),
            remat=remat,
            placement=placement,
        )

    return Network(*nnx.split(nnx.eval_shape(build)))


def apply_of(module: nnx.Module) -> tuple[Callable, Params]:
    """Return a module as a function `(params, *inputs)` and its parameters."""
    graphdef, state = nnx.split(module)

    def apply(params: Params, *inputs):
        return nnx.merge(graphdef, filled(state, params))(*inputs)

    return apply, nnx.to_pure_dict(state)


def make_placement(config, mesh: Mesh) -> Placement:
    """Return how the config's networks run on a mesh.

    Raises:
      UserError: naming the field of `config.attention` that is wrong.
    """
    settings = config.attention
    blocks = SplashBlocks(
        forward=settings.forward_blocks,
        backward=settings.backward_blocks,
        fused_backward=settings.fused_backward,
    )
    return Placement(settings.kernel, mesh=mesh, batch_axes=BATCH_AXES, sequence_axis="seq", blocks=blocks)


@dataclass(frozen=True)
class Networks:
    """What the steps apply: the trained graph (generator and fake_score) and the teacher's.

    `interpolator(params, latents)` makes the missing frames of half-rate steps; None where there are none.
    """

    student: Callable
    teacher: Callable
    interpolator: Callable | None = None


def make_networks(config, model: WanDiTConfig, mesh: Mesh, interpolator: Callable | None = None) -> Networks:
    """Build the graphs of a run's networks for a mesh; `interpolator` is taken as it is.

    Raises:
      UserError: attention heads that `mesh.seq` does not divide, or a wrong field of `config.attention`.
    """
    placement = make_placement(config, mesh)
    make = partial(make_network, model, placement=placement)
    return Networks(
        student=make(dtype=config.compute_dtype, param_dtype="float32", remat=config.remat),
        teacher=make(dtype=config.teacher_dtype, param_dtype=config.teacher_dtype, remat="none"),
        interpolator=interpolator,
    )
