"""Networks of a distillation that are trained whole, or as adapters over the frozen teacher that all of them share."""

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial

import jax
import optax
from jax.sharding import Mesh

from avd_jax.errors import UserError
from avd_jax.fields import Field, Fields, not_negative, one_of, positive
from avd_jax.methods import transformers
from avd_jax.models.adapters import TARGETS, Adapters, joined
from avd_jax.models.functional import Denoiser, Params, make_denoiser
from avd_jax.models.wan_dit import WanDiTConfig
from avd_jax.training.method import Trained

BASE = "teacher"  # the entry of `Method.frozen` that adapters stand on
NETWORKS = {"both": ("generator", "fake_score"), "generator": ("generator",), "fake_score": ("fake_score",)}

ADAPTER_FIELDS: Fields = {
    "lora.rank": Field(
        0,
        "rank of adapters that are trained over the teacher's weights, of which no network has a copy; 0: none",
        not_negative,
    ),
    "lora.alpha": Field(32.0, "adapters count by alpha / rank", positive),
    "lora.targets": Field(
        TARGETS, "layers that have adapters: names, or ends of dotted names such as self_attn.q or text_embedding_0"
    ),
    "lora.networks": Field("both", "which are adapters: " + ", ".join(NETWORKS), one_of(NETWORKS)),
}


def adapters_of(config) -> Adapters | None:
    """Return the adapters that a config asks for, or None."""
    lora = config.lora
    return Adapters(lora.rank, float(lora.alpha), tuple(lora.targets)) if lora.rank else None


def record(config) -> dict:
    """Return what checkpoints say of the adapters of a run that has some (`convert/on_base.py` reads it)."""
    lora = config.lora
    names = {"targets": list(lora.targets), "networks": list(NETWORKS[lora.networks])}
    return {"rank": lora.rank, "alpha": float(lora.alpha), **names}


class StudentNetworks:
    """How generator and fake_score are made, and what of them is trained."""

    def __init__(self, config, model: WanDiTConfig, mesh: Mesh, start: Callable):
        """Build nothing yet.

        Args:
          config: of a distillation.
          model: sizes.
          mesh: to run on.
          start: shardings -> the whole parameters to start from.
        """
        self._config, self._model, self._start = config, model, start
        self._placement = transformers.make_placement(config.attention, mesh)
        self._adapters = adapters_of(config)
        self._adapted = NETWORKS[config.lora.networks] if self._adapters else ()

    @cached_property
    def network(self) -> Denoiser:
        """The network of both."""
        return self.make(self._config.remat)

    def make(self, remat: str, *, tangents: bool = False) -> Denoiser:
        """Return it once more, for `jax.jvp` if `tangents`; a UserError names the field of `config.lora`."""
        dtypes = {"dtype": self._config.compute_dtype, "param_dtype": "float32"}
        placement = dataclasses.replace(self._placement, tangents=tangents)
        try:
            return make_denoiser(self._model, **dtypes, remat=remat, placement=placement, adapters=self._adapters)
        except UserError as error:
            raise UserError(f"config.lora.{error}") from None

    def trained(self, name: str, optimizer: optax.GradientTransformation, ema_decay: Callable | None = None) -> Trained:
        """Return what is trained of the network `name`."""
        options = {"optimizer": optimizer, "ema_decay": ema_decay, "optimizer_memory": self._config.optimizer.memory}
        if name not in self._adapted:
            return Trained(self.network.abstract_params(), self._start, **options)
        return Trained(self._abstract_adapters, self._new_adapters, **options, frozen=BASE, whole=joined)

    def needs_base(self, names) -> bool:
        """Return whether one of these networks stands on the teacher."""
        return any(name in self._adapted for name in names)

    @cached_property
    def _abstract_adapters(self) -> Params:
        return jax.eval_shape(partial(self.network.new_adapters, self._config.seed))

    @cached_property
    def _new_adapters(self) -> Callable:
        """One function for both networks, which so start from one load."""
        new = partial(self.network.new_adapters, self._config.seed)
        return lambda shardings: jax.jit(new, out_shardings=shardings)()
