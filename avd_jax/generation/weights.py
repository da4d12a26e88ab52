"""The four parts that a video needs, opened and checked against each other before anything large is loaded."""

import hashlib
from dataclasses import dataclass

from avd_jax.convert.adapted import with_adapters
from avd_jax.convert.architectures import UMT5, WAN_DIT, WAN_VAE
from avd_jax.convert.fingerprint import fingerprint
from avd_jax.convert.loading import load_tokenizer, open_interpolator_of
from avd_jax.convert.weights import Weights, open_weights
from avd_jax.data.tokenizer import Tokenizer
from avd_jax.errors import UserError
from avd_jax.generation.settings import Settings


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
        transformer=with_adapters(open_weights(source, WAN_DIT, settings.which), settings.lora),
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
    weights = open_interpolator_of(settings.checkpoint, settings.weights, key=settings.which)
    if weights is None:
        raise UserError(
            f"half_rate_steps={settings.half_rate_steps}: {settings.checkpoint or settings.weights} has no frame "
            "interpolator; name the weights that made the video"
        )
    return weights
