"""The four parts that a video needs, opened and checked against each other before anything large is loaded."""

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from avd_jax.convert.architectures import UMT5, WAN_DIT, WAN_VAE
from avd_jax.convert.loading import load_tokenizer, open_interpolator_of
from avd_jax.convert.weights import Weights, open_weights
from avd_jax.data.tokenizer import Tokenizer
from avd_jax.errors import UserError
from avd_jax.generation.settings import Settings

# A fine-tune changes nearly every leaf, but one merged from low-rank factors may change attention only.
_TELLING_LEAF = "blocks.self_attn.q.kernel"
_SMALL_LEAF = 1 << 20  # elements
_MOST_LEAVES = 32
_MOST_VALUES = 1 << 20


@dataclass(frozen=True)
class Parts:
    """Opened weights; no array is in memory yet."""

    transformer: Weights
    vae: Weights
    text_encoder: Weights
    tokenizer: Tokenizer
    interpolator: Weights | None

    def fingerprints(self) -> dict[str, str]:
        """Return component -> a short text that identifies its weights, in whatever layout they are stored."""
        networks = {name: getattr(self, name) for name in ("transformer", "vae", "text_encoder")}
        if self.interpolator is not None:
            networks["interpolator"] = self.interpolator
        found = {name: fingerprint(weights) for name, weights in networks.items()}
        return found | {"tokenizer": hashlib.sha256(self.tokenizer.serialized).hexdigest()[:16]}


def open_parts(settings: Settings) -> Parts:
    """Open what the settings name.

    Raises:
      UserError: something is missing or damaged, or the parts do not go together.
    """
    source = settings.checkpoint or settings.weights
    parts = Parts(
        transformer=open_weights(source, WAN_DIT, settings.which),
        vae=open_weights(settings.weights, WAN_VAE, ""),
        text_encoder=open_weights(settings.weights, UMT5, ""),
        tokenizer=load_tokenizer(settings.weights),
        interpolator=_open_interpolator(settings) if settings.half_rate_steps else None,
    )
    dit, vae, umt5 = parts.transformer.config, parts.vae.config, parts.text_encoder.config
    for what, has, other, needs in (
        ("in_dim", dit.in_dim, "z_dim of the VAE", vae.z_dim),
        ("out_dim", dit.out_dim, "z_dim of the VAE", vae.z_dim),
        ("text_dim", dit.text_dim, "width of the text encoder", umt5.dim),
    ):
        if has != needs:
            raise UserError(
                f"{source}: the transformer's {what} is {has}, but the {other} in {settings.weights} is {needs}; "
                "name weights that belong together"
            )
    if parts.interpolator is not None and parts.interpolator.config.channels != vae.z_dim:
        raise UserError(
            f"the frame interpolator takes {parts.interpolator.config.channels} channels, but the z_dim of the VAE in "
            f"{settings.weights} is {vae.z_dim}; use the one that was trained for this VAE"
        )
    return parts


def _open_interpolator(settings: Settings) -> Weights:
    weights = open_interpolator_of(settings.checkpoint, settings.weights)
    if weights is None:
        raise UserError(
            f"half_rate_steps={settings.half_rate_steps}: {settings.checkpoint or settings.weights} has no frame "
            "interpolator; name the weights that made the video"
        )
    return weights


def fingerprint(weights: Weights) -> str:
    """Return a short text that identifies a network's weights, in whatever layout they are stored, read from a few."""
    small = sorted(path for path, leaf in weights.leaves.items() if math.prod(leaf.shape) <= _SMALL_LEAF)
    chosen = small[:: math.ceil(len(small) / _MOST_LEAVES) or 1]
    if _TELLING_LEAF in weights.leaves and _TELLING_LEAF not in chosen:
        chosen.append(_TELLING_LEAF)
    digest = hashlib.sha256()
    for path in chosen:
        array = weights.array(path)
        digest.update(f"{path} {array.shape} {array.dtype}".encode())
        values = array.reshape(-1)
        digest.update(np.ascontiguousarray(values[:: math.ceil(values.size / _MOST_VALUES) or 1]).tobytes())
    return digest.hexdigest()[:16]
