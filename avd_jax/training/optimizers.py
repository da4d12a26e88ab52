"""The optimizers of the methods: each scales the gradient down to a global norm first."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from avd_jax.models.functional import Params


def constant(settings, learning_rate: float) -> optax.GradientTransformation:
    """Build AdamW with a constant rate.

    Args:
      settings: has max_grad_norm, beta1, beta2, epsilon and weight_decay.
      learning_rate: of this network.
    """
    return optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm),
        optax.adamw(
            learning_rate,
            b1=settings.beta1,
            b2=settings.beta2,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
        ),
    )


def warmed_up(settings, learning_rate: float) -> optax.GradientTransformation:
    """Build AdamW whose rate rises linearly over the first updates, and is constant then.

    Without a first moment (beta1 = 0) there is none to keep: a third of the state less.

    Args:
      settings: as for `constant`, and warmup_steps; max_grad_norm 0 clips nothing.
      learning_rate: of this network.
    """
    rate = optax.linear_schedule(1e-6 * learning_rate, learning_rate, settings.warmup_steps)
    if settings.beta1:
        moments = optax.scale_by_adam(settings.beta1, settings.beta2, settings.epsilon)
    else:
        moments = optax.scale_by_rms(settings.beta2, settings.epsilon, eps_in_sqrt=False, bias_correction=True)
    clip = [optax.clip_by_global_norm(settings.max_grad_norm)] if settings.max_grad_norm else []
    decay = optax.add_decayed_weights(settings.weight_decay)
    return optax.chain(*clip, moments, decay, optax.scale_by_learning_rate(rate))


def scheduled(
    settings, num_steps: int, matrices: Callable[[Params], object] | None = None
) -> optax.GradientTransformation:
    """Build an optimizer with a linear warm-up and a cosine decay to zero.

    Args:
      settings: the fields `optimizer.*` of `config.SCHEDULE_FIELDS`.
      num_steps: updates over which the rate rises and falls.
      matrices: which axes of each parameter are the rows and columns of matrices that Muon is to update
        (arXiv 2502.16982), None for the parameters that AdamW updates; without it AdamW updates all.
    """
    rate = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, settings.warmup_steps, max(num_steps, settings.warmup_steps + 1)
    )
    if matrices is None:
        update = optax.adamw(rate, b1=settings.beta1, b2=settings.beta2, weight_decay=settings.weight_decay)
    else:
        update = optax.contrib.muon(
            rate,
            weight_decay=settings.weight_decay,
            adam_b1=settings.beta1,
            adam_b2=settings.beta2,
            adam_weight_decay=settings.weight_decay,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=0.2,  # updates as large as AdamW's
        )
    return optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), update)


def growing_decay(decay: float) -> Callable[[jax.Array], jax.Array]:
    """Return the decay of a running mean by step: a short run's mean must not remember its random start."""
    return lambda step: jnp.minimum(decay, (1 + step) / (10 + step))


def power_decay(exponent: float) -> Callable[[jax.Array], jax.Array]:
    """Return the decay by step of a running mean whose memory grows with the run: (1 - 1 / (n + 1))^(exponent + 1).

    The first update replaces the start. An exponent of 6.94 has a deviation of a tenth of the run (arXiv 2312.02696).
    """
    return lambda step: (1 - 1 / (step + 1)) ** (exponent + 1)
